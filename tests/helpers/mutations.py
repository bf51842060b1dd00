"""Changes to files as a stranger would make them, with or without knowing their format; every one is drawn from a `Random`."""

import copy
import io
import json
import math
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from random import Random

import torch

NUMBERS = (0, -1, 1, 3, 255, 2**31 - 1, 2**31, 2**53, 2**63, -(2**63), 2**64, 10**30, 10**400)
FLOATS = (0.5, -0.0, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf)
TEXTS = ("", "x", "cls", "-1", "1e400", "a\0b", "../x", "/dev/zero", "\ud800", "é", "＃", "x" * 70_000, "\n\n", "__class__")
CANARY = "canary"
_RUN = f"open({CANARY!r},'w')"
CODE = (
    f"cos\nsystem\n(S'touch {CANARY}'\ntR.",
    f"cposix\nsystem\n(S'touch {CANARY}'\ntR.",
    f'cbuiltins\nexec\n(S"{_RUN}"\ntR.',
    f'cbuiltins\neval\n(S"{_RUN}"\ntR.',
    f"(ios\nsystem\nS'touch {CANARY}'\n.",
    f"(S'touch {CANARY}'\nios\nsystem\n.",
    f"(cos\nsystem\nS'touch {CANARY}'\no.",
    f"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch {CANARY}\x85R.",
    f"cbuiltins\nopen\n(S'{CANARY}'\nS'w'\ntR.",
    f"cpathlib\nPath\n(S'{CANARY}'\ntR(S'touch'\nS'x'\ntb.",
    f"ctorch\nload\n(S'{CANARY}'\ntR.",
    f"ctorch.serialization\nos.system\n(S'touch {CANARY}'\ntR.",
    f"\x80\x04\x8c\x13torch.serialization\x8c\x09os.system\x93\x8c\x0ctouch {CANARY}\x85R.",
    f"csubprocess\nPopen\n((lS'touch'\naS'{CANARY}'\natR.",
)
"""Pickles that make the file `CANARY` where they are trusted."""
MEMORY = (
    b"cbuiltins\nbytearray\n(L6000000000L\ntR.",
    b"c_codecs\nencode\n(X\x01\0\0\0aX\x06\0\0\0latin1tR.",
    b"\x80\x04N\x95" + struct.pack("<Q", 2**62) + b".",
    b"Nr\xff\xff\xff\x7f.",
    b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"a.",
    b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"a.",
    b"\x80\x04B" + struct.pack("<I", 2**32 - 1) + b"a.",
    b"\x8b" + struct.pack("<i", 2**31 - 1) + b"\1.",
    b"(" * 100_000 + b"t" * 100_000 + b".",
    b"]" + b"]a" * 1000 + b".",
    b"]q\0h\0a.",
    b"}q\0h\0h\0s.",
    b"ccollections\nOrderedDict\n(tR(dS'__class__'\nNstb.",
    b"ctorch\nSize\n(L9999999999L\ntR.",
    b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(ctorch\nfloat32\n(L9999999999L\nt(I1\ntI00\ntR.",
    b"L" + b"9" * 100_000 + b"L\n.",
    b"I" + b"9" * 5000 + b"\n.",
)
"""Pickles that ask for memory, time or stack."""


def change_bytes(random: Random, content: bytes) -> bytes:
    """Flips, cuts, doubles, takes out or overwrites some bytes, more often near the beginning and the end."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        place = _place(random, len(changed))
        kind = random.choice(("flip", "flip", "flip", "cut", "splice", "delete", "number", "number", "noise"))
        if kind == "flip" and changed:
            changed[place] ^= 1 << random.randrange(8)
        elif kind == "cut" and random.random() < 0.5:
            del changed[place:]
        elif kind == "splice":
            start = random.randrange(len(changed) + 1)
            changed[place:place] = changed[start : start + random.choice((1, 4, 64, 1000))]
        elif kind == "delete":
            del changed[place : place + random.choice((1, 4, 64))]
        elif kind == "number":
            form = random.choice(("<I", ">I", "<Q", ">Q", "<H", ">H", "<i"))
            length = struct.calcsize(form)
            changed[place : place + length] = (random.choice(NUMBERS[:12]) % 256**length).to_bytes(
                length, "little" if form[0] == "<" else "big"
            )
        elif kind == "noise":
            changed[place : place + 8] = bytes(random.randrange(256) for _ in range(8))
    return bytes(changed)


def _place(random: Random, length: int) -> int:
    if not length:
        return 0
    near = random.choice((64, 512, length, -256))
    return max(0, length + random.randrange(near, 0)) if near < 0 else random.randrange(min(near, length))


def change_tree(random: Random, tree):
    """A copy of nested dictionaries and lists in which one thing is another."""
    tree = copy.deepcopy(tree)
    holder, key = None, None
    value = tree
    while isinstance(value, dict | list) and value and (holder is None or random.random() < 0.75):
        holder, key = value, random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
        value = holder[key]
    if holder is None:
        return odd_value(random, tree)
    kind = random.choice(("odd", "odd", "odd", "drop", "swap", "rename", "nest", "double"))
    if kind == "drop":
        del holder[key]
    elif kind == "swap":
        other = random.choice(list(holder)) if isinstance(holder, dict) else random.randrange(len(holder))
        holder[key], holder[other] = holder[other], holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[random.choice((*TEXTS, f"{key}x"))] = holder.pop(key)
    elif kind == "nest":
        holder[key] = random.choice(([value], {"x": value}, [value] * 1000))
    elif kind == "double" and isinstance(holder, list):
        holder.append(value)
    else:
        holder[key] = odd_value(random, value)
    return tree


def odd_value(random: Random, value):
    """Something that might stand where `value` does, and should not."""
    if isinstance(value, torch.Tensor) and random.random() < 0.8:
        return odd_tensor(random, value)
    kinds = (NUMBERS, FLOATS, TEXTS, (None, True, False, [], {}, [[]], [0] * 1000, {"": {}}))
    if isinstance(value, int | float) and not isinstance(value, bool) and random.random() < 0.5:
        kinds = ((-value, value + 1, value * 2, value / 3, str(value), float(value), [value]),)
    return random.choice(random.choice(kinds))


def odd_tensor(random: Random, value: torch.Tensor) -> torch.Tensor:
    """A tensor of another dtype, shape, layout or contents."""
    makers = (
        lambda: torch.full_like(value, random.choice((0, 1, 100))),
        lambda: torch.full_like(value, math.nan) if value.is_floating_point() else -value,
        lambda: value * 1e30,
        lambda: value.to(random.choice((torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8))),
        lambda: value.to(torch.complex64),
        lambda: value.to(torch.float8_e4m3fn),
        lambda: value.flatten()[:1],
        lambda: value.flatten()[:0],
        lambda: value.unsqueeze(0),
        lambda: value.T.contiguous() if value.dim() == 2 else value.reshape(-1, 1),
        lambda: torch.zeros(1, dtype=value.dtype).expand(2**40),
        lambda: value.to_sparse(),
        lambda: value.to("meta"),
        lambda: torch.nn.Parameter(value.float()),
        lambda: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
    )
    try:
        return random.choice(makers)()
    except (RuntimeError, NotImplementedError):
        return value[..., None]


def change_json(random: Random, content: bytes) -> bytes:
    """JSON with one value, key or token changed, or bytes."""
    kind = random.choice(("tree", "tree", "tree", "token", "bytes", "deep"))
    if kind == "tree":
        changed = change_tree(random, json.loads(content))
        return json.dumps(changed).encode(errors="surrogatepass")
    if kind == "deep":
        return random.choice((b"[" * 200_000, b'{"a":' * 200_000, b"", b"null", b"[]", b'"x"', b"\xff\xfe{", b"{}" * 2))
    return _change_token(random, content) if kind == "token" else change_bytes(random, content)


def _change_token(random: Random, content: bytes) -> bytes:
    """One number or word of a text is another."""
    tokens = list(re.finditer(rb"-?\d[\d.e+-]*|\"[^\"]*\"|true|false|null", content))
    if not tokens:
        return change_bytes(random, content)
    token = random.choice(tokens)
    words = (
        b"9" * 5000,
        b"1" + b"0" * 400,
        b"1e400",
        b"-1e400",
        b"NaN",
        b"nan",
        b"inf",
        b"-Infinity",
        b"0x10",
        b"1_000",
        b'""',
    )
    words += (
        "１２".encode(),
        b"[" * 5000,
        b"[1, [2]]",
        b"true",
        b"null",
        b'"\\ud800"',
        b'"\\u0000"',
        b"-0",
        b"1979-05-27",
        b"",
    )
    return content[: token.start()] + random.choice(words) + content[token.end() :]


def change_lines(random: Random, content: bytes) -> bytes:
    """Lines of JSON or TOML, of which one is changed, doubled, dropped or put elsewhere."""
    lines = content.splitlines(keepends=True)
    place, kind = random.randrange(len(lines)), random.choice(("token", "token", "token", "drop", "double", "bytes", "extra"))
    if kind == "drop":
        del lines[place]
    elif kind == "double":
        lines.insert(random.randrange(len(lines) + 1), lines[place])
    elif kind == "extra":
        lines.insert(
            place, random.choice((b"[x]\n", b"[[x]]\n", b"x.y.z = 1\n", b"\xff\xfe\n", b"{}\n", b"x = " + b"[" * 9999 + b"\n"))
        )
    else:
        lines[place] = (_change_token if kind == "token" else change_bytes)(random, lines[place])
    return b"".join(lines)


def change_pickle(random: Random, content: bytes) -> bytes:
    """A pickle of which an opcode is doubled, dropped or another, or that runs code or asks for memory somewhere."""
    kind = random.choice(("code", "code", "memory", "bytes", "insert", "drop", "name", "double"))
    if kind == "code":
        return random.choice(CODE).encode("latin1")
    if kind == "memory":
        return random.choice(MEMORY)
    if kind == "bytes":
        return change_bytes(random, content)
    places = [place for _, _, place in pickletools.genops(content)]
    place = random.randrange(1, len(places))
    start, end = places[place - 1], places[place]
    if kind == "insert":
        return content[:end] + random.choice((*(code.encode("latin1") for code in CODE), *MEMORY))[:-1] + content[end:]
    if kind == "name":
        names = (b"torch._utils\n_rebuild_sparse_tensor\n", b"torch._utils\n_rebuild_qtensor\n", b"torch\nFloatStorage\n")
        names += (b"torch._utils\n_rebuild_wrapper_subclass\n", b"torch._tensor\n_rebuild_from_type_v2\n", b"os\nsystem\n")
        return re.sub(rb"torch\._utils\n_rebuild_tensor_v2\n", random.choice(names), content, count=1)
    return content[:start] + (content[end:] if kind == "drop" else content[start:end] * 2 + content[end:])


def change_archive(random: Random, content: bytes) -> bytes:
    """What `torch.save` wrote, with other bytes under right checksums, other values, or other bytes."""
    kind = random.choice(("tree", "tree", "tree", "pickle", "pickle", "part", "bytes", "whole"))
    if kind == "bytes" or (kind in ("pickle", "part") and not content.startswith(b"PK")):
        return change_bytes(random, content)
    if kind == "whole":
        return change_pickle(random, pickle.dumps({"model": {}}, protocol=2))
    if kind == "tree":
        return saved(change_tree(random, torch.load(io.BytesIO(content), weights_only=True)), content.startswith(b"PK"))
    return rezipped(content, lambda name, part: _change_part(random, kind, name, part))


def _change_part(random: Random, kind: str, name: str, part: bytes) -> bytes:
    if name.endswith("data.pkl"):
        return change_pickle(random, part) if kind == "pickle" else part
    return change_bytes(random, part) if kind == "part" and random.random() < 0.2 else part


def saved(value, zipped: bool = True) -> bytes:
    """What `torch.save` makes of it; of what it cannot save, of None."""
    file = io.BytesIO()
    try:
        torch.save(value, file, _use_new_zipfile_serialization=zipped)
    except (RuntimeError, NotImplementedError, OverflowError):
        return saved(None, zipped)
    return file.getvalue()


def rezipped(content: bytes, change) -> bytes:
    """An archive whose parts are what `change(name, part)` gives, with right checksums."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(file, "w") as after:
        for entry in before.infolist():
            after.writestr(entry.filename, change(entry.filename, before.read(entry)))
    return file.getvalue()


def change_safetensors(random: Random, content: bytes) -> bytes:
    """Safetensors with another header, or other bytes."""
    if random.random() < 0.3:
        return change_bytes(random, content)
    (length,) = struct.unpack("<Q", content[:8])
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
    own = header.get("__metadata__", {}).get("crate_fast")
    if own is not None and random.random() < 0.6:
        values = json.loads(own)
        values.pop("digest", None)  # then nothing else tells that it was changed
        text = json.dumps(change_tree(random, values)).encode(errors="surrogatepass").decode(errors="replace")
        header["__metadata__"]["crate_fast"] = random.choice((text, text, text, _change_token(random, own.encode()).decode()))
    else:
        header = change_tree(random, header)
    text = json.dumps(header).encode(errors="surrogatepass")
    length = random.choice((len(text), len(text), len(text), len(text), *NUMBERS[:11])) % 2**64
    return struct.pack("<Q", length) + text + rest


def change_image(random: Random, content: bytes) -> bytes:
    """An image with other bytes; in PNG also with other sizes under right checksums."""
    if content.startswith(b"\x89PNG") and random.random() < 0.6:
        header = bytearray(content[12:29])
        place, form = random.choice(((4, ">I"), (8, ">I"), (12, ">B"), (13, ">B"), (16, ">B")))
        number = random.choice((0, 1, 2, 3, 4, 6, 7, 8, 16, 9_000, 2**31 - 1, 2**32 - 1)) % 256 ** struct.calcsize(form)
        struct.pack_into(form, header, place, number)
        return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
    return change_bytes(random, content)
