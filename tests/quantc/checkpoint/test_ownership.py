"""Only what quantc wrote is ever removed or replaced; anything else is a refusal that names it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantc.checkpoint.config import describe_quantization
from quantc.checkpoint.ownership import MARK, check_place, lasting, mark, remove, survey
from quantc.checkpoint.reader import is_checkpoint
from quantc.checkpoint.writer import CheckpointWriter
from quantc.errors import CheckpointError, UsageError
from quantc.plan import Plan
from quantc.spec import QuantSpec
from tests.quantc.cli_runner import run

CONFIG = {"model_type": "llama", "quantization_config": describe_quantization({}, QuantSpec())}


def write(out: Path, force: bool = False, meanwhile: Callable[[], object] = lambda: None) -> Path:
    """A checkpoint with a tokenizer and a template in a folder; meanwhile: what happens while it is written."""

    def companions(folder: Path) -> None:
        (folder / "odd.vocab").write_text("of a tokenizer that nobody knows")
        (folder / "templates").mkdir()
        (folder / "templates/tools.jinja").write_text("{{ messages }}")

    with CheckpointWriter(out, force) as writer:
        writer.add("t", torch.zeros(3))
        writer.add_files(companions)
        meanwhile()
        writer.commit(CONFIG, {})
    return out


def everything(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder, with what is in the files."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(folder: Path, message: str, out: Path, **options: bool) -> None:
    """Check that a writer refuses and that nothing has changed."""
    before = everything(folder)
    with pytest.raises(UsageError) as caught:
        CheckpointWriter(out, **options)
    assert str(caught.value) == message
    assert everything(folder) == before


BUILT = "the checkpoint is built there, so move that elsewhere, or choose another --out."
REPLACED = "--force does not replace that, so move it elsewhere, or choose another --out."
RETIRED = "an old output gets that name until the new one is whole, so rename it, or choose another --out."


@pytest.mark.parametrize("options", [{}, {"force": True}, {"resume": True}], ids=str)
def test_somebodys_folder_where_the_checkpoint_is_built(options: dict[str, bool], tmp_path: Path) -> None:
    place = tmp_path / "m.unfinished"
    place.mkdir()
    for name in ("chapter.txt", "config.json", "shard-00001.data"):
        (place / name).write_text("irreplaceable")
    message = f"{place} holds 'chapter.txt' and 2 more that quantc did not write; {BUILT}"
    refused(tmp_path, message, tmp_path / "m", **options)
    (place / "chapter.txt").unlink()
    place = place.rename(tmp_path / "build-1.unfinished")
    message = f"{place} holds 'config.json' and 1 more that quantc did not write; {BUILT}"
    refused(tmp_path, message, tmp_path / "build-1", **options)


@pytest.mark.parametrize("options", [{}, {"force": True}, {"resume": True}], ids=str)
def test_somebodys_file_in_the_folder_of_a_run(options: dict[str, bool], tmp_path: Path) -> None:
    place = tmp_path / "m.unfinished"
    (place / "notes").mkdir(parents=True)
    (place / "notes/chapter.txt").write_text("irreplaceable")
    mark(place, ["tokenizer.json"])
    for name in ("tokenizer.json", "shard-00001.data", "hidden-abcd0123", "plan.yaml"):
        (place / name).write_text("quantc's")
    refused(tmp_path, f"{place} holds 'notes' that quantc did not write; {BUILT}", tmp_path / "m", **options)
    (place / "notes").rename(tmp_path / "notes")
    write(tmp_path / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "notes"]


def test_a_link_a_file_a_mount_and_another_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, out = tmp_path / "m.unfinished", tmp_path / "m"
    (tmp_path / "elsewhere").mkdir()
    place.symlink_to(tmp_path / "elsewhere")
    refused(tmp_path, f"{place} is a symbolic link; {BUILT}", out, force=True)
    place.unlink()
    place.write_text("irreplaceable")
    refused(tmp_path, f"{place} is a file; {BUILT}", out, force=True)
    place.unlink()
    write(out)
    with monkeypatch.context() as patch:
        patch.setattr("quantc.checkpoint.workplace.own_user", lambda _: False)
        refused(tmp_path, f"{out} belongs to another user; {REPLACED}", out, force=True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda self: self == out)
        refused(tmp_path, f"{out} is a mount point; {REPLACED}", out, force=True)

    def read_only(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("quantc.checkpoint.workplace.own_user", read_only)
    refused(tmp_path, f"{out} cannot be written to (Permission denied); {REPLACED}", out, force=True)


def test_force_keeps_somebodys_files_in_an_old_checkpoint(tmp_path: Path) -> None:
    out = write(tmp_path / "m")
    write(out, force=True)
    (out / "report.html").write_text("a page of `quantc report`")
    (out / "templates/mine.jinja").write_text("irreplaceable")
    message = f"{out} holds 'templates/mine.jinja' that quantc did not write; {REPLACED}"
    refused(tmp_path, message, out, force=True)
    (out / "README.md").symlink_to(tmp_path / "elsewhere")
    (out / "model-00001-of-00001.safetensors").rename(tmp_path / "moved")
    (out / "model-00001-of-00001.safetensors").symlink_to(tmp_path / "moved")
    message = f"{out} holds 'README.md' and 2 more that quantc did not write; {REPLACED}"
    refused(tmp_path, message, out, force=True)


def test_a_checkpoint_that_lists_no_files_is_told_by_usual_names(tmp_path: Path) -> None:
    out = write(tmp_path / "m")
    (out / "quantc.json").write_text("{}")
    assert [path.name for path in survey(out).foreign] == ["odd.vocab", "templates"]
    for name in ("tokenizer.json", "merges.txt", "plan.yaml"):
        (out / name).write_text("")
    assert [path.name for path in survey(out).foreign] == ["odd.vocab", "templates"]


def test_somebodys_folder_that_has_the_name_of_a_replaced_one(tmp_path: Path) -> None:
    (tmp_path / "m.replaced").mkdir()
    (tmp_path / "m.replaced/chapter.txt").write_text("irreplaceable")
    out = write(tmp_path / "m")
    assert (tmp_path / "m.replaced/chapter.txt").read_text() == "irreplaceable"
    refused(tmp_path, f"{tmp_path / 'm.replaced'} is not quantc's; {RETIRED}", out, force=True)


def test_a_checkpoint_that_somebody_named_so_is_no_replaced_one(tmp_path: Path) -> None:
    backup = write(tmp_path / "m.replaced")
    out = write(tmp_path / "m")
    assert is_checkpoint(backup)
    refused(tmp_path, f"{backup} is not quantc's; {RETIRED}", out, force=True)


def die(*_: object) -> None:
    raise KeyboardInterrupt


def die_at_the_second_rename(patch: pytest.MonkeyPatch) -> None:
    rename, seen = Path.rename, []

    def once(self: Path, target: Path) -> Path:
        seen.append(self)
        return rename(self, target) if len(seen) == 1 else die()  # type: ignore[return-value]

    patch.setattr(Path, "rename", once)


def die_before_the_old_one_is_removed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("quantc.checkpoint.workplace._remove_or_warn", die)


@pytest.mark.parametrize("dies", [die_at_the_second_rename, die_before_the_old_one_is_removed])
def test_a_run_that_is_killed_while_it_replaces(
    dies: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write(tmp_path / "m")
    with monkeypatch.context() as patch:
        dies(patch)
        with pytest.raises(KeyboardInterrupt):
            write(out, force=True)
    assert is_checkpoint(tmp_path / "m.replaced")
    assert is_checkpoint(out) == (dies is die_before_the_old_one_is_removed)
    write(out, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_file_that_is_put_into_the_old_output_while_the_new_one_is_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = write(tmp_path / "m")
    with caplog.at_level(logging.WARNING):
        write(out, force=True, meanwhile=lambda: (out / "chapter.txt").write_text("irreplaceable"))
    assert everything(tmp_path / "m.replaced") == {str(tmp_path / "m.replaced/chapter.txt"): b"irreplaceable"}
    assert caplog.messages == [f"{tmp_path / 'm.replaced'} stays, as quantc did not write chapter.txt"]
    assert is_checkpoint(out)


def test_an_output_that_somebody_makes_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "m"
    with pytest.raises(
        CheckpointError, match=r"m was made by somebody else meanwhile; move it elsewhere, and resume\.$"
    ):
        write(out, meanwhile=lambda: write(out / "inner"))
    assert is_checkpoint(out / "inner")


def test_a_file_that_is_put_into_the_folder_of_a_run_outlives_it(tmp_path: Path) -> None:
    place = tmp_path / "m.unfinished"
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "m") as writer:
        writer.add("t", torch.zeros(3))
        (place / "chapter.txt").write_text("irreplaceable")
        raise KeyboardInterrupt
    assert everything(place) == {str(place / "chapter.txt"): b"irreplaceable"}
    (place / "chapter.txt").unlink()
    out = write(tmp_path / "m", meanwhile=lambda: (place / "chapter.txt").write_text("irreplaceable"))
    assert (out / "chapter.txt").read_text() == "irreplaceable"
    assert "chapter.txt" not in (out / "quantc.json").read_text()


def test_builds_of_a_quality_target_are_removed_with_the_folder_they_are_in(tmp_path: Path) -> None:
    place = tmp_path / "m.unfinished"
    place.mkdir()
    mark(place)
    write(place / "build-1")
    (place / "build-2.unfinished").mkdir()
    mark(place / "build-2.unfinished")
    (place / "build-2.unfinished/shard-00001.data").write_bytes(b"half")
    (place / "build-1/chapter.txt").write_text("irreplaceable")
    message = f"{place} holds 'build-1/chapter.txt' that quantc did not write; {BUILT}"
    refused(tmp_path, message, tmp_path / "m", force=True)
    (place / "build-1/chapter.txt").unlink()
    assert remove(place) == []
    assert list(tmp_path.iterdir()) == []


def test_a_removal_that_is_interrupted_leaves_what_is_told_as_quantcs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write(tmp_path / "m")
    mark(out)
    count, unlink = len(survey(out).own), Path.unlink
    for left in range(count, 0, -1):

        def once(self: Path, missing_ok: bool = False) -> None:
            unlink(self, missing_ok)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", once)
            with pytest.raises(KeyboardInterrupt):
                remove(out)
        assert len(survey(out).own) == left - 1
        assert survey(out).foreign == []


def test_what_the_manifest_lists_is_what_was_written(tmp_path: Path) -> None:
    out = write(tmp_path / "m")
    assert sorted(lasting(out)) == sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert not (out / MARK).exists()


def test_places_where_no_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work/inner").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    here, home = "the folder this runs in", "your home folder"
    places = {
        "/": f"/ exists already: it is above {here}; pass an --out inside it.",
        ".": f". exists already: it is {here}; pass an --out inside it.",
        "..": f".. exists already: it is above {here}; pass an --out inside it.",
        "../home": f"../home exists already: it is {home}; pass an --out inside it.",
        "~/m": "--out is ~/m, and '~' means your home folder to the shell alone; write its path.",
    }
    for place, message in places.items():
        for force in (False, True):
            with pytest.raises(UsageError) as caught:
                CheckpointWriter(Path(place), force)
            assert str(caught.value) == message
    model = tmp_path / "models/tiny"
    model.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(model)
    for place, words in {
        model: "holds the model that is read; pass another --out",
        link: "holds the model that is read; pass another --out",
        model.parent: "holds the model that is read; pass another --out",
        model / "m": f"is inside the model's own folder {model}; pass an --out outside of it",
    }.items():
        with pytest.raises(UsageError) as caught:
            check_place(place, model)
        assert str(caught.value) == f"{place} {words}."
    check_place(model.parent / "tiny-w4", model)


def test_an_output_that_is_a_link_to_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "disk/m")
    (tmp_path / "m").symlink_to(tmp_path / "disk/m")
    write(tmp_path / "m", force=True)
    assert os.path.islink(tmp_path / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "m"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["m"]


def test_files_beside_a_plan_and_a_page(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml.unfinished").write_text("irreplaceable")
    (tmp_path / "real.yaml").write_text("old")
    (tmp_path / "plan.yaml").symlink_to(tmp_path / "real.yaml")
    Plan({}).write(tmp_path / "plan.yaml")
    assert (tmp_path / "plan.yaml.unfinished").read_text() == "irreplaceable"
    assert os.path.islink(tmp_path / "plan.yaml")
    assert "version: 1" in (tmp_path / "real.yaml").read_text()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_page_replaces_pages_only(tmp_path: Path) -> None:
    from tests.quantc.cli_runner import make_report

    make_report().write(tmp_path)
    page, notes = tmp_path / "page.html", tmp_path / "notes.txt"
    notes.write_text("irreplaceable")
    for _ in range(2):
        assert run("report", str(tmp_path), "-o", str(page)).exit_code == 0
    result = run("report", str(tmp_path), "-o", str(notes))
    assert result.exit_code == 2
    assert result.stderr == f"Error: {notes} exists, and quantc did not write it; pass another --out.\n"
    assert notes.read_text() == "irreplaceable"
