"""A terminal to look at: what is written to a pseudo-terminal, as rows."""

import fcntl
import os
import re
import struct
import termios

WRITTEN = re.compile(r"\x1b\[(\d*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")

END = "\0"  # of what has been written so far


class Terminal:
    """A pseudo-terminal of so many columns.

    When it gets narrower, and it `reflows`, as most do, it breaks lines that are longer anew and keeps the cursor at its
    character; else it cuts them off, as xterm does.
    """

    def __init__(self, columns, reflows):
        self.master, slave = os.openpty()
        self.stream = open(slave, "w", encoding="utf-8")  # noqa: SIM115
        self.reflows, self.lines, self.line, self.column = reflows, [""], 0, 0
        self._set(columns)

    def close(self):
        self.stream.close()
        os.close(self.master)

    def resize(self, columns):
        self.read()
        self._set(columns)
        if not self.reflows:
            self.lines = [line[:columns] for line in self.lines]
            self.column = min(self.column, columns - 1)

    def rows(self):
        """The rows that are to be seen, without spaces at their ends."""
        self.read()
        rows = [
            line[start : start + self.columns] for line in self.lines for start in range(0, max(1, len(line)), self.columns)
        ]
        return [row.rstrip() for row in rows]

    def read(self):
        """Takes in what was written."""
        self.stream.write(END)
        self.stream.flush()
        written = b""
        while not written.endswith(END.encode()):
            written += os.read(self.master, 65536)
        for match in WRITTEN.finditer(written.decode().removesuffix(END)):
            number, command, moved, text = match.groups()
            if command:
                self._obey(command, int(number or 0))
            elif text:
                self._put(text)
            elif moved == "\r":
                self.column -= self.column % self.columns
            else:
                self._down()

    def _set(self, columns):
        self.columns = columns
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def _put(self, text):
        line = self.lines[self.line].ljust(self.column)
        self.lines[self.line] = line[: self.column] + text + line[self.column + len(text) :]
        self.column += len(text)

    def _down(self):
        """To the row below, of this line or of the next."""
        self.column += self.columns
        if self.column >= max(1, len(self.lines[self.line])):
            self.line, self.column = self.line + 1, self.column % self.columns
            self.lines += [""] * (self.line + 1 - len(self.lines))

    def _obey(self, command, number):
        assert (command, number) == ("J", 0), f"ESC[{number}{command} is not known here"
        self.lines = [*self.lines[: self.line], self.lines[self.line][: self.column]]
