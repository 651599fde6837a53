"""Every public name is documented in numpydoc form, its examples run, and so does the README."""
import ast
import doctest
import functools
import importlib
import inspect
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import orchvlm

ROOT = Path(__file__).parents[2]
ORDER = ["Parameters", "Attributes", "Returns", "Yields", "Raises", "Warns", "See Also", "Notes",
         "References", "Examples"]


def shape_letters():
    """The letters that ovlm.h declares."""
    header = ROOT / "csrc" / "ovlm.h"
    if not header.exists():
        pytest.skip("the sources are not here")
    block = re.search(r"Shape letters.*?\n \*\n", header.read_text(), re.DOTALL)[0]
    return set(re.findall(r"(?:^ \*   |   |  )([A-Za-z]) [a-z]", block, re.MULTILINE))


def public_objects(name):
    """(name, object) of an export: itself, or the members of a module."""
    value = getattr(orchvlm, name)
    if inspect.ismodule(value):
        own = [key for key, member in vars(value).items() if not key.startswith("_")
               and getattr(member, "__module__", None) == value.__name__]
        for member in getattr(value, "__all__", own):
            yield f"{name}.{member}", getattr(value, member)
    else:
        yield name, value


def documented(export):
    """The same with the public methods of classes."""
    for name, value in public_objects(export):
        yield name, value
        if not inspect.isclass(value) or issubclass(value, Exception):
            continue
        own = [base for base in value.__mro__ if base.__module__.startswith("orchvlm.")]
        for key, member in {k: v for base in reversed(own) for k, v in vars(base).items()}.items():
            if key.startswith("_") and key != "__call__":
                continue
            if isinstance(member, (classmethod, staticmethod)):
                member = member.__func__
            if inspect.isfunction(member) or isinstance(member, property):
                yield f"{name}.{key}", member


def sections(doc):
    """{title: body} of a numpydoc docstring; "" is what stands before the first title."""
    lines = inspect.cleandoc(doc).splitlines()
    found, title, body = {}, "", []
    i = 0
    while i < len(lines):
        if (i + 1 < len(lines) and lines[i] in ORDER and lines[i + 1]
                and set(lines[i + 1]) == {"-"}):
            found[title] = "\n".join(body).strip("\n")
            title, body = lines[i], []
            i += 2
        else:
            body.append(lines[i])
            i += 1
    found[title] = "\n".join(body).strip("\n")
    return found


def syntax(function):
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])


def complaints(name, value):
    doc = value.fget.__doc__ if isinstance(value, property) else value.__doc__
    if not doc:
        return ["has no docstring"]
    parts, wrong = sections(doc), []
    summary = parts[""].split("\n\n")[0]
    if not re.search(r"[.:]$", summary.strip()) and not isinstance(value, property):
        wrong.append("its first paragraph is no sentence")
    if list(parts)[1:] != [title for title in ORDER if title in parts]:
        wrong.append(f"sections stand in the order {list(parts)[1:]}")
    if isinstance(value, property) or inspect.isclass(value) and issubclass(value, Exception):
        return wrong
    try:
        parameters = [p for p in inspect.signature(value).parameters if p not in ("self", "cls")]
    except ValueError:
        parameters = []
    described = re.findall(r"^(\**\w+(?:, *\**\w+)*) : \S", parts.get("Parameters", ""),
                           re.MULTILINE)
    described = {p.strip("* ") for names in described for p in names.split(",")}
    plain_record = inspect.isclass(value) and "Attributes" in parts
    if not plain_record:
        missing = [p for p in parameters if p not in described]
        if missing:
            wrong.append(f"Parameters leaves out {', '.join(missing)}, or their type")
        if extra := described - set(parameters):
            wrong.append(f"Parameters describes {', '.join(sorted(extra))}, which it has not")
        raises = any(isinstance(node, ast.Raise) for node in ast.walk(syntax(value)))
        exported = name in orchvlm.__all__ and parameters
        if (raises or exported) and "Raises" not in parts:
            wrong.append("Raises is missing")
    if inspect.isfunction(value):
        returns = [node for node in ast.walk(syntax(value)) if isinstance(node, ast.Return)
                   and node.value is not None and not isinstance(node.value, ast.Constant)]
        if returns and not {"Returns", "Yields"} & set(parts):
            wrong.append("Returns is missing")
    if "Examples" not in parts:
        if name in orchvlm.__all__:  # methods are shown by their class
            wrong.append("Examples is missing")
    elif ">>>" not in parts["Examples"]:
        wrong.append("Examples shows no doctest")
    letters = shape_letters()
    for shape in re.findall(r"(?:u?int\d*|float\d*|bool)\[([^\]\n]*)\]", doc):
        for letter in re.findall(r"\b[A-Za-z]\b", shape):
            if letter not in letters:
                wrong.append(f"shape letter {letter} in [{shape}] is not declared in ovlm.h")
    return wrong


def test_the_shape_letters_are_found():
    assert {"n", "N", "M", "P", "D"} <= shape_letters()


@pytest.mark.parametrize("name", orchvlm.__all__)
def test_docstrings(name):
    wrong = [f"orchvlm.{full}: {text}" for full, value in documented(name)
             for text in complaints(full, value)]
    assert not wrong, "\n" + "\n".join(wrong)


@functools.cache
def modules():
    names = {orchvlm.__name__}
    for path in Path(orchvlm.__file__).parent.rglob("*.py"):
        parts = path.relative_to(Path(orchvlm.__file__).parent).with_suffix("").parts
        if parts[-1] not in ("__main__", "__init__"):
            names.add(".".join((orchvlm.__name__, *parts)))
        elif parts[:-1]:
            names.add(".".join((orchvlm.__name__, *parts[:-1])))
    return sorted(names)


@pytest.mark.parametrize("name", modules())
def test_doctests(name):
    if name.startswith("orchvlm.torch"):
        pytest.importorskip("torch")
    module = importlib.import_module(name)
    optional = {"matplotlib": ("plots",), "scipy": ("milp",),
                "PIL": ("images", "processor", "mixture", "tasks", "sheet", "training",
                        "evaluation", "pretraining"),
                "tokenizers": ("tokenizer",)}
    for package, users in optional.items():
        if name.endswith(users):
            pytest.importorskip(package)
    result = doctest.testmod(module)
    assert result.failed == 0


# ---------------------------------------------------------------- README

def blocks(language):
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README here")
    return re.findall(rf"^```{language}\n(.*?)^```", readme.read_text(), re.DOTALL | re.MULTILINE)


def test_readme_python_runs():
    examples = blocks("python")
    assert examples
    space = {"__name__": "readme"}
    for example in examples:
        exec(compile(example, "README.md", "exec"), space)  # each goes on from the one before


def commands():
    """Lines of the README's shell blocks, cut at && and without comments."""
    for block in blocks("sh"):
        for line in block.splitlines():
            for command in line.split("&&"):
                words = shlex.split(command, comments=True)
                if words:
                    yield words


def test_readme_commands_are_real(tmp_path):
    seen = list(commands())
    assert ["orchvlm", "plan", "--demo"] in seen and ["pytest"] in seen
    (tmp_path / "lengths.csv").write_text("".join(f"{n}\n" for n in range(100, 3000, 100)))
    (tmp_path / "sounds.csv").write_text("id,seconds\na,2.5\nb,0.9\n")
    for words in seen:
        program = words[0]
        words = [str(tmp_path / word) if word.endswith((".csv", ".png")) else word
                 for word in words]
        if program == "orchvlm":
            if words[1] == "train":  # as written, but for its length
                pytest.importorskip("PIL")
                run = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
                words = [*words, "--steps", "2", "--samples", "1", "--out", str(run)]
            elif words[1] == "report":
                words[2] = str(run)
            out = subprocess.run([sys.executable, "-m", "orchvlm", *words[1:]], text=True,
                                 capture_output=True, cwd=ROOT)
            assert out.returncode == 0 and out.stdout, f"{words}: {out.stderr}"
        elif program == "python":
            assert (ROOT / words[1]).exists(), words
        elif "/" in program:
            assert (ROOT / program).exists(), words
        else:
            assert program in ("pip", "pytest", "git", "cd", "make", "torchrun", "mpirun"), words
