"""Which files in a folder quantc wrote itself. Only these are ever removed or replaced.

A folder in which a run works carries a mark. There, and in checkpoints, files are recognised by their names: those that
quantc gives, and those that the mark or the manifest lists. Links, other names and files of another user are foreign.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UsageError
from ..files.untrusted import read_json
from .journal import JOURNAL, open_own
from .reader import MANIFEST, is_checkpoint
from .shards import INDEX, SINGLE

MARK = "quantc-run.json"
LIST = "written"  # the key of marks and manifests under which the names of files are
_WEIGHTS = r"model-\d{5,}-of-\d{5,}\.safetensors"
# `quantc report` writes report.html.
_OF_CHECKPOINT = re.compile(rf"config\.json|quantc\.json|{re.escape(INDEX)}|{_WEIGHTS}|plan\.yaml|report\.(json|html)")
_PASSING = re.compile(r"(resume|quantc-run)\.json(\.new)?|shard-\d{5,}\.data|hidden-[a-z0-9_]{8}")  # none in the end
_SCRATCH = re.compile(r"(parts|distill)-[a-z0-9_]{8}/.*")  # what is in folders of temporary files
_BUILD = re.compile(r"build-\d+(\.unfinished|\.replaced)?")  # of a quality target
# What checkpoints may have beside these whose manifest lists no files.
_UNLISTED = frozenset(
    f"{SINGLE} tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt "
    "merges.txt tokenizer.model spiece.model sentencepiece.bpe.model chat_template.jinja chat_template.json "
    "generation_config.json".split()
)
_ORDER = {JOURNAL: 0, MANIFEST: 2, MARK: 3}  # of removal: what identifies quantc's files goes after them


@dataclass
class Contents:
    """What is in a folder: files that quantc wrote, folders of its own (inner ones first), and what is not its own."""

    own: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    foreign: list[Path] = field(default_factory=list)

    def named(self, folder: Path) -> str:
        """Return what is foreign, in words: the first entry, and how many others there are."""
        first, others = self.foreign[0].relative_to(folder), len(self.foreign) - 1
        return f"{str(first)!r}" + (f" and {others} more" if others else "")


def mark(folder: Path, files: Iterable[str] = ()) -> None:
    """Mark a folder as one that a run works in; files: names of what it writes there besides its usual files."""
    fresh = folder / (MARK + ".new")
    try:
        with open(fresh, "w", encoding="utf-8", opener=open_own) as stream:
            json.dump({"quantc": "works in this folder, and removes it in the end", LIST: sorted(files)}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(folder / MARK)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def marked(folder: Path) -> set[str] | None:
    """Return the names that a folder's mark lists; None where there is no mark."""
    return _listed(folder / MARK)


def is_run(folder: Path) -> bool:
    """Return whether a run works or worked in the folder."""
    return marked(folder) is not None or _is_own_journal(folder / JOURNAL)


def is_output(folder: Path) -> bool:
    """Return whether a folder is a checkpoint, or was written for another runtime: quantc.json then lists its files."""
    return is_checkpoint(folder) or _listed(folder / MANIFEST) is not None


def survey(folder: Path, inner: bool = False) -> Contents:
    """Return what is in a folder. In one that is neither a run's nor a checkpoint everything is foreign.

    inner: it is a build inside of a run's folder, which may have lost what tells it.
    """
    found = Contents()
    run = is_run(folder)
    if not (run or inner or is_output(folder)):
        found.foreign = sorted(folder.iterdir())
        return found
    listed = _listed(folder / MANIFEST)
    names = (marked(folder) or set()) | (_UNLISTED if listed is None else listed)
    _Walk(folder, names, run, listed is None or run, found).into(folder)
    return found


@dataclass
class _Walk:
    root: Path
    names: set[str]  # relative to the root
    run: bool
    usual: bool  # whether names that checkpoints usually have are quantc's
    found: Contents

    def into(self, folder: Path) -> None:
        owner = os.lstat(folder).st_uid
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            path = Path(entry.path)
            name = path.relative_to(self.root).as_posix()
            if not os.path.lexists(path):  # a run that works here has removed it
                continue
            if entry.stat(follow_symlinks=False).st_uid != owner:
                self.found.foreign.append(path)
            elif entry.is_dir(follow_symlinks=False):
                self._folder(path, name)
            elif entry.is_file(follow_symlinks=False) and self._is_own(name):
                self.found.own.append(path)
            else:
                self.found.foreign.append(path)
        self.found.folders.append(folder)

    def _folder(self, path: Path, name: str) -> None:
        if self.run and _BUILD.fullmatch(name):
            inner = survey(path, inner=True)
            self.found.own += inner.own
            self.found.folders += inner.folders
            self.found.foreign += inner.foreign
        elif self._is_scratch(name + "/") or any(known.startswith(name + "/") for known in self.names):
            self.into(path)
        else:
            self.found.foreign.append(path)

    def _is_own(self, name: str) -> bool:
        fixed = name in (MANIFEST, MARK, JOURNAL, "report.html") or (self.run and bool(_PASSING.fullmatch(name)))
        usual = self.usual and bool(_OF_CHECKPOINT.fullmatch(name))
        return name in self.names or fixed or usual or self._is_scratch(name)

    def _is_scratch(self, name: str) -> bool:
        return self.run and bool(_SCRATCH.fullmatch(name))


def lasting(folder: Path) -> list[str]:
    """Return the names of what quantc wrote in a folder, relative to it, without what only a run needs."""
    names = (path.relative_to(folder).as_posix() for path in survey(folder).own)
    return [name for name in names if not (_PASSING.fullmatch(name) or _SCRATCH.fullmatch(name))]


def remove(folder: Path, keep: Collection[str] = ()) -> list[Path]:
    """Remove what quantc wrote in a folder, and folders in which nothing is left; return what stays.

    keep: names of files right in it that stay too, which are not returned. Raises OSError. When this is interrupted,
    what is left is still recognised as quantc's.
    """
    found = survey(folder)
    telling = [folder / MANIFEST, folder / MARK]  # they say which files are quantc's: removed after these
    removed = [path for path in found.own if path.relative_to(folder).as_posix() not in keep]
    for path in sorted(set(removed).difference(telling), key=lambda path: _ORDER.get(path.name, 1)):
        path.unlink(missing_ok=True)
    _remove_empty(found.folders[:-1])
    for path in telling:
        if path in removed:
            path.unlink(missing_ok=True)
    _remove_empty([folder])
    return found.foreign


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        if not any(folder.iterdir()):
            folder.rmdir()


def own_user(folder: Path) -> bool:
    """Return whether a folder belongs to the user that files written there belong to."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        return os.fstat(probe.fileno()).st_uid == os.lstat(folder).st_uid


def check_place(out: Path, source: Path | None = None) -> None:
    """Raise UsageError where a checkpoint must not be written: around the user, or over or into the source.

    source: the model's folder or file.
    """
    place, here, home = out.resolve(), Path.cwd(), Path(os.path.expanduser("~")).resolve()
    if out.parts[:1] == ("~",):
        raise UsageError(f"--out is {out}, and '~' means your home folder to the shell alone; write its path.")
    for inner, what in ((here, "the folder this runs in"), (home, "your home folder")):
        if place == inner or place in inner.parents:
            part = "" if place == inner else "above "
            raise UsageError(f"{out} exists already: it is {part}{what}; pass an --out inside it.")
    if source is not None:
        model = source.resolve()
        if place == model or place in model.parents:
            raise UsageError(f"{out} holds the model that is read; pass another --out.")
        if model in place.parents:
            raise UsageError(f"{out} is inside the model's own folder {source}; pass an --out outside of it.")


def _listed(file: Path) -> set[str] | None:
    """Return the names of files that a mark or a manifest lists; None where there is no such list."""
    try:
        names = read_json(file).get(LIST)
    except (OSError, ValueError, AttributeError):
        return None
    return set(map(str, names)) if isinstance(names, list) else None


def _is_own_journal(file: Path) -> bool:
    """Return whether a file is a journal of quantc's; runs of older versions left a journal and no mark."""
    try:
        return {"version", "identity"} <= set(read_json(file))
    except (OSError, ValueError, TypeError):
        return False
