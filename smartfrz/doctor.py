"""`smartfrz doctor`: what is installed, what works, and how to repair what does not.

Frameworks are imported in processes of their own: one that is installed badly may well end the process that imports it.
"""

import contextlib
import difflib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smartfrz import __version__, zoo
from smartfrz.errors import install_command
from smartfrz.zoo import fetch, registry, signatures, urls

PACKAGES = ("numpy", "torch", "keras", "tensorflow", "jax", "transformers", "lightning", "onnx", "kserve")
RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-rocm")
VARIABLES = (
    "SMARTFRZ_ALLOW_HTTP",
    "SMARTFRZ_ALLOW_PRIVATE",
    "SMARTFRZ_CACHE",
    "SMARTFRZ_LIGHTNING",
    "SMARTFRZ_LOCK",
    "SMARTFRZ_OFFLINE",
    "SMARTFRZ_ZOO",
)
# Of our tests and benchmarks; they change nothing here.
_OTHER_VARIABLES = ("COMPILE", "DATA", "DEVICES", "FUZZ", "REQUIRED", "WEIGHTS")
_SECONDS = 120.0  # for importing a framework from a cold disk
_IMPORTS = {
    "onnxruntime": "import onnxruntime as o; found = {'providers': o.get_available_providers()}",
    "torch": """import torch
cuda = torch.cuda.is_available()
found = {'cuda': torch.version.cuda, 'gpus': [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
         if cuda else []}""",
    "keras": "import keras; found = {'backend': keras.backend.backend()}",
}


def examine(tell: Callable[[float, str], None] = lambda fraction, text: None) -> dict[str, Any]:
    """Look at this installation. Nothing is changed, and no network is used.

    Args:
        tell: Called with the fraction done and what is looked at.

    Returns:
        What was found, ready for JSON. `problems` is a list of objects with `what` is wrong and how to `fix` it. Passwords,
        keys and the user's name are left out.
    """
    problems: list[dict[str, str]] = []

    def problem(what: object, fix: str) -> None:
        problems.append({"what": _without_secrets(str(what)), "fix": fix})

    found: dict[str, Any] = {
        "smartfrz": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "runtimes": {name: version for name in RUNTIMES if (version := _version(name))},
    }
    looks: dict[str, Callable[[], Any]] = {
        "imports": lambda: _imports(found["packages"], found["runtimes"], problem),
        "gpu": _gpus,
        "predictors": lambda: _predictors(found["runtimes"], problem),
        "cache": lambda: _cache(problem),
        "registries": lambda: _registries(problem),
        "variables": lambda: _variables(problem),
        "versions": lambda: _bounds(problem),
    }
    for number, (name, look) in enumerate(looks.items()):
        tell(number / len(looks), name)
        try:
            found[name] = look()
        except Exception as error:
            found[name] = None
            problem(f"{name} cannot be examined: {type(error).__name__}: {error}", "Tell us, with all of this.")
    found.pop("versions")
    return {**found, "problems": problems}


def text(found: dict[str, Any]) -> str:
    """Return the findings for a person."""
    imports, lines = found["imports"] or {}, []

    def row(name: str, value: object) -> None:
        lines.append(f"{name:14} {value}")

    row("smartfrz", found["smartfrz"])
    row("python", found["python"])
    row("system", f"{found['system']}, {found['cpus']} CPUs")
    for name, version in found["packages"].items():
        extra = imports.get(name) or {}
        facts = "".join(f", {key} {_words(value)}" for key, value in extra.items() if value)
        row(name, f"{version}{facts}" if version else "not installed")
    for name, version in found["runtimes"].items():
        row(name, version)
    row("providers", _words((imports.get("onnxruntime") or {}).get("providers")))
    row("gpu", _words(found["gpu"]))
    for name, state in (found["predictors"] or {}).items():
        row("predictor", f"{name}: {state}")
    if cache := found["cache"]:
        row("cache", f"{cache['folder']}, {cache['files']} files, {cache['bytes'] / 1e6:.1f} MB")
    for name, state in (found["registries"] or {}).items():
        row("registry", f"{name}: {state}")
    for name, value in (found["variables"] or {}).items():
        row("variable", f"{name}={value}")
    lines.append("")
    for one in found["problems"]:
        lines += [f"Problem: {one['what']}", f"    Fix: {one['fix']}"]
    number = len(found["problems"])
    lines.append(
        ("No problem was found." if not number else f"{number} problem{'s' * (number > 1)}.")
        + " For a bug report, paste all of this, the command that you gave, and what it printed with --verbose."
    )
    return "\n".join(lines)


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value or "none")


def _version(package: str) -> str | None:
    """Return the version of a package; TensorFlow has another name without CUDA."""
    for name in (package, f"{package}-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


Problem = Callable[[object, str], None]


def _imports(packages: dict[str, str | None], runtimes: dict[str, str], problem: Problem) -> dict[str, Any]:
    """Import what is installed, each in a process of its own."""
    found = {}
    for name, code in _IMPORTS.items():
        if not (packages.get(name) or (name == "onnxruntime" and runtimes)):
            continue
        found[name], fault = _import(code)
        if fault:
            installed = " ".join(runtimes) if name == "onnxruntime" else name
            problem(f"import {name} fails: {fault}", f"pip install --force-reinstall {installed}")
    return found


def _import(code: str) -> tuple[Any, str]:
    """Return what a process printed as JSON in its last line, and what went wrong."""
    command = [sys.executable, "-c", f"import json\n{code}\nprint('\\n' + json.dumps(found))"]
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, env=os.environ | quiet
        )
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1]), ""
    except subprocess.TimeoutExpired:
        return None, f"no answer within {_SECONDS:.0f} s"
    except (OSError, ValueError, IndexError) as error:
        return None, str(error)
    last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"exit code {done.returncode}"]
    return None, last[0]


def _gpus() -> list[str]:
    """Return the GPUs that NVIDIA's driver knows."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def _predictors(runtimes: dict[str, str], problem: Problem) -> dict[str, str]:
    """Load the predictors of this package, each of which answers a question about two layers then."""
    if not runtimes:
        problem(
            "ONNX Runtime is not installed, so that no predictor can decide on this machine.",
            f'{install_command()}, or name a server: predictor="http://host:port/NAME"',
        )
    elif len(runtimes) > 1:
        problem(
            f"{' and '.join(runtimes)} are both installed, and overwrite each other's files.",
            f"pip uninstall -y {' '.join(runtimes)}, then install one of them",
        )
    found = {}
    for entry in registry.embedded():
        try:
            if runtimes:
                zoo.load(str(entry), device="cpu")
            found[str(entry)] = "answers" if runtimes else "not tried"
        except Exception as error:
            found[str(entry)] = "fails"
            problem(f"Predictor {entry}: {error}", "pip install --force-reinstall smartfrz, or see ONNX Runtime above")
    return found


def _cache(problem: Problem) -> dict[str, Any]:
    folder = fetch.folder()
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    nearest = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    if not writable:
        problem(
            f"The cache {folder} cannot be written, so that downloads are not kept.",
            "Set SMARTFRZ_CACHE to a folder that you may write to",
        )
    size = 0
    for path in files:
        with contextlib.suppress(OSError):
            size += path.stat().st_size
    return {"folder": _without_secrets(str(folder)), "files": len(files), "bytes": size, "writable": writable}


def _registries(problem: Problem) -> dict[str, str]:
    """Read the registries on this machine; others are only named."""
    found = {registry.EMBEDDED: f"{len(registry.embedded())} predictors"}
    for location in registry.locations():
        name = _without_secrets(location)
        try:
            place, _ = signatures.split(location)
            if urls.local_path(urls.registry_url(place)) is None:
                found[name] = "elsewhere, not asked; smartfrz zoo list asks"
            else:
                found[name] = f"{len(registry.entries_of(location))} predictors"
        except Exception as error:
            found[name] = "cannot be read"
            key = location.partition("#minisign=")[2]
            # An error may write a secret in another way, for example with %40 for @.
            hidden = any(sign in location for sign in "@?;")
            what = f"{location} cannot be read: {type(error).__name__}" if hidden else error
            problem(str(what).replace(key, "...") if key else what, "Correct SMARTFRZ_ZOO, or the registry")
    return found


def _variables(problem: Problem) -> dict[str, str]:
    others = {f"SMARTFRZ_{name}" for name in _OTHER_VARIABLES}
    for name in sorted(os.environ):
        if name.startswith("SMARTFRZ_") and name not in VARIABLES and name not in others:
            close = difflib.get_close_matches(name, VARIABLES, n=1)
            problem(
                f"{name} is set, which SmartFRZ does not know.",
                f"Set {close[0]} instead" if close else f"unset {name}; known are {', '.join(VARIABLES)}",
            )
    shown = (*VARIABLES, "KERAS_BACKEND", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")
    return {name: _without_secrets(os.environ[name]) for name in shown if name in os.environ}


def _bounds(problem: Problem) -> None:
    """Compare versions with what the package asks for, those of optional packages as well."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return
    wanted: dict[str, list[Any]] = {}
    for line in importlib.metadata.requires("smartfrz") or ():
        requirement = Requirement(line)
        if requirement.name != "smartfrz":
            wanted.setdefault(requirement.name, []).append(requirement.specifier)
    for name, specifiers in wanted.items():
        version = _version(name)
        # Two extras may ask for different versions: one that suits either is fine.
        if version and not any(specifier.contains(version, prereleases=True) for specifier in specifiers):
            expected = " or ".join(dict.fromkeys(map(str, specifiers)))
            problem(f"{name} {version} is installed; expected {expected}.", f'pip install "{name}{specifiers[0]}"')


def _without_secrets(value: str) -> str:
    """Take user names, passwords, queries and keys out of the addresses in a text, and the home folder out of its paths."""
    with contextlib.suppress(RuntimeError):
        home = str(Path.home())
        if len(home) > 1:
            value = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", value)
    # Addresses may be divided by any blank, or by other characters; each begins with its scheme.
    return "".join(map(_safe, re.split(r"(\s+|(?<![\w+.-])(?=\w[\w+.-]*:/))", value)))


def _safe(word: str) -> str:
    """Take the secrets out of a text that holds one address at most."""
    word = re.sub(r"#minisign=[\w+/=]+", "#minisign=...", word)
    begin = re.match(r"\w[\w+.-]*:[/\\]+", word)
    if begin is None:
        return re.sub(r"\S*:\S*@", "...@", word)  # an address whose scheme was forgotten
    rest, question, _ = word[begin.end() :].partition("?")
    fragment = "".join(re.findall(r"#minisign=\.\.\.", word)[:1]) if question else ""
    host, slash, path = rest.partition("/")
    if begin[0].lower().startswith("http"):  # a password may hold a slash; elsewhere @ is before a revision
        host, slash, path = ("...@" + rest.rpartition("@")[2], "", "") if "@" in rest else (host, slash, path)
    elif "@" in host:
        host = "...@" + host.rpartition("@")[2]
    path = re.sub(";[^/#]*", ";...", host + slash + path)
    return begin[0] + re.sub("#(?!minisign)[^=]*=.*", "#...", path) + ("?..." if question else "") + fragment
