"""Two hosts train together, one is cut off mid-run and comes back; the run must end as one on which nothing was cut.

    sudo python tests/hosts.py    # Linux, root and `ip`: hosts are network namespaces on a bridge; about three minutes

Each host runs one agent of torchrun, of one process, as long as it takes. Host 2 loses its link and so its agent cannot meet
the other; both agents are ended, as a cluster ends the jobs of a lost node, the link comes back, and both start again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import kill
from helpers.pictures import make_folder

HOSTS = ("crate1", "crate2")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
SETTINGS = [*kill.SETTINGS, "--epochs", "3", "--workers", "0"]


def ip(*words: str, check: bool = True) -> None:
    """Runs `ip words`."""
    subprocess.run(["ip", *words], check=check, capture_output=not check)


def make_hosts() -> None:
    """Two namespaces, each with an end of one cable."""
    for host in HOSTS:
        ip("netns", "add", host)
        ip("-n", host, "link", "set", "lo", "up")
    ip("link", "add", "wire1", "netns", HOSTS[0], "type", "veth", "peer", "name", "wire2", "netns", HOSTS[1])
    for number, (host, address) in enumerate(zip(HOSTS, ADDRESSES, strict=True), 1):
        ip("-n", host, "address", "add", f"{address}/24", "dev", f"wire{number}")
        ip("-n", host, "link", "set", f"wire{number}", "up")


def remove_hosts() -> None:
    for host in HOSTS:
        ip("netns", "del", host, check=False)


class Host:
    """One agent of torchrun on host `number` (from 0), training in `out`."""

    def __init__(self, number: int, data: Path, out: Path, launch: str, more: list[str]) -> None:
        agent = ["--nnodes=2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv-backend=c10d", f"--rdzv-id={launch}"]
        agent += [f"--rdzv-endpoint={ADDRESSES[0]}:29511", f"--rdzv-conf=is_host={int(number == 0)}"]
        agent += [f"--local-addr={ADDRESSES[number]}", "--monitor-interval=0.5"]
        words = ["train", "--data", str(data), *SETTINGS, *more, "--out", str(out), "--resume", "auto"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"wire{number + 1}"}
        command = ["ip", "netns", "exec", HOSTS[number], sys.executable, "-m", "torch.distributed.run", *agent]
        self.log = out.parent / f"{out.name}-{HOSTS[number]}.log"
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*command, "-m", "crate_fast", *words], stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def end(self) -> None:
        """Ends the agent and its worker at once."""
        for pid in [*kill._descendants(self.process.pid), self.process.pid]:
            subprocess.run(["kill", "-9", str(pid)], check=False, capture_output=True)
        self.process.wait()

    def finish(self) -> None:
        """Waits for its end, which must be a good one."""
        if self.process.wait(timeout=400):
            raise SystemExit(f"{self.log} ends with: {self.log.read_text()[-2000:]}")


def step_of(out: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(path.stem[5:13]) for path in (out / "checkpoints").glob("step-*.*")), default=0)


def run(data: Path, out: Path, cut: bool, more: list[str]) -> None:
    """Trains on both hosts; with `cut` the second one loses its link after three steps and gets it back."""
    hosts = [Host(number, data, out, "first", more) for number in range(2)]
    if cut:
        end = time.monotonic() + 200
        while step_of(out) < 3:
            if time.monotonic() > end or any(host.process.poll() is not None for host in hosts):
                raise SystemExit(f"no third step: {hosts[0].log.read_text()[-2000:]}")
            time.sleep(0.05)
        ip("-n", HOSTS[1], "link", "set", "wire2", "down")
        before = step_of(out)
        time.sleep(10)
        print(f"cut off at step {before}; ten seconds later the newest checkpoint is of step {step_of(out)}, agents "
              f"{[host.process.poll() for host in hosts]} (None: still there)", flush=True)  # fmt: skip
        for host in hosts:
            host.end()
        ip("-n", HOSTS[1], "link", "set", "wire2", "up")
        hosts = [Host(number, data, out, "second", more) for number in range(2)]
    for host in hosts:
        host.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="ddp")
    arguments = parser.parse_args()
    more = ["--strategy", arguments.strategy]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_folder(folder / "data", train=90, val=90)
        remove_hosts()
        try:
            make_hosts()
            for out, cut in (("straight", False), ("cut", True)):
                run(data, folder / out, cut, more)
        finally:
            remove_hosts()
        (weights, rows), (weights_cut, rows_cut) = kill.outcome(folder / "straight"), kill.outcome(folder / "cut")
        if weights != weights_cut or rows != rows_cut:
            raise SystemExit(f"weights equal: {weights == weights_cut}, metrics equal: {rows == rows_cut}")
        print(f"cut off and back: the same weights and the same {len(rows)} lines of metrics")


if __name__ == "__main__":
    main()
