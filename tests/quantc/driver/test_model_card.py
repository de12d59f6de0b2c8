"""README.md of a checkpoint: the hub parses it, and what it takes from the source cannot break it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from quantc.driver.model_card import NOT_MEASURED, model_card, note_measured
from quantc.frontend.facts import facts_of_fields, facts_of_folder
from quantc.recipe import Recipe, preset
from quantc.report import LinearReport, Report
from quantc.spec import QuantSpec, spec_of_label

SOURCE_CARD = """---
license: llama3.2
license_name: Llama 3.2 Community License
license_link: LICENSE.txt
language: [en, de]
pipeline_tag: text-generation
base_model: someone/small-1B-base
extra_gated_prompt: "### LICENSE"
---

# small-1B
"""
SNAPSHOT = Path("/cache/models--someone--small-1B/snapshots/0123")


def card_of(facts: dict[str, Any], folder: Path, path: Path = SNAPSHOT, *labels: str) -> str:
    source: Any = SimpleNamespace(name="small-1B", path=path, facts=facts)
    report = Report("small-1B", "out", weights_bytes=1000, source_bytes=4000, calibration="builtin, 64 x 512 tokens")
    report.linears = [LinearReport("up", QuantSpec(4, 128), (256, 128), 0, 4.25, 0.1, "gptq")]
    specs = [spec_of_label(label) for label in labels or ("w4g128", "w4g128", "w8g128")]
    return model_card(source, [*specs, None], report, preset("fast").to_dict(), folder)


def test_the_hub_reads_where_a_model_comes_from_and_its_licence(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(SOURCE_CARD)
    facts = facts_of_folder(tmp_path)
    card = ModelCard(card_of(facts, tmp_path))
    assert card.data.to_dict() == {
        "base_model": "someone/small-1B", "base_model_relation": "quantized", "library_name": "transformers",
        "license": "llama3.2", "license_name": "Llama 3.2 Community License",
        "license_link": "https://huggingface.co/someone/small-1B/blob/main/LICENSE.txt",
        "language": ["en", "de"], "pipeline_tag": "text-generation", "tags": ["quantc"],
    }  # fmt: skip
    (tmp_path / "LICENSE.txt").touch()  # as it is copied
    assert ModelCard(card_of(facts, tmp_path)).data["license_link"] == "LICENSE.txt"
    assert "license_link" not in ModelCard(card_of(facts, tmp_path / "other", Path("small"))).data.to_dict()


def test_what_it_says_of_bits_formats_and_recipe(tmp_path: Path) -> None:
    text = card_of({}, tmp_path)
    assert "\n# someone/small-1B, quantized with quantc\n\n4.25 bits per weight in the linears of the blocks, 1" in text
    assert "1.00 kB of weight files, 0.250 of the original's size" in text
    assert "| `w4g128` | 2 |\n| `unquantized` | 1 |\n| `w8g128` | 1 |" in text
    assert "Calibration text: builtin, 64 x 512 tokens." in text
    shown = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert Recipe.from_dict(shown) == preset("fast")
    assert "name no licence" in text


def test_formats_of_llama_cpp_are_named_so(tmp_path: Path) -> None:
    own = "These formats are llama.cpp's own"
    assert own in card_of({}, tmp_path, SNAPSHOT, "q4_k", "q6_k")
    assert own not in card_of({}, tmp_path, SNAPSHOT, "q4_k", "w4g128")


def test_what_was_measured_replaces_that_nothing_was(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(card_of({}, tmp_path))
    assert NOT_MEASURED in file.read_text()
    for _ in range(2):  # a run that was interrupted at its very end does this again
        note_measured(tmp_path, "a KL divergence of 0.03, at most 0.05 wanted")
    assert "\nMeasured: a KL divergence of 0.03, at most 0.05 wanted.\n" in file.read_text()
    assert NOT_MEASURED not in file.read_text()


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: 'mit\\n---\\n# Free'", {}),
        ("license: {a: 1}\nlanguage: [en, 5, '<b>']", {"language": ["en"]}),
        ("license: [mit, apache-2.0]", {"license": ["mit", "apache-2.0"]}),
        ("license_link: 'javascript:alert(1)'", {}),
        ("license_link: '../../etc/passwd'\nrepository: some/one", {}),
        ("a: &a [*a, *a]", {}),
        ("- license", {}),
        ("license: [", {}),
    ],
)
def test_front_matter_of_another_form_is_left_out(tmp_path: Path, front: str, expected: dict[str, Any]) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
    assert facts_of_folder(tmp_path) == expected
    ModelCard(card_of(expected, tmp_path))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("LICENSE", "  Apache License\n  Version 2.0, January 2004\n", {"license": "apache-2.0"}),
        ("licence.txt", "MIT License\n\nCopyright", {"license": "mit"}),
        ("LICENSE.md", "Gemma Terms of Use", {"license": "other", "license_link": "LICENSE.md"}),
        ("NOTICE", "MIT License", {}),
    ],
)
def test_the_licence_of_a_folder_whose_card_names_none(
    tmp_path: Path, name: str, text: str, expected: dict[str, str]
) -> None:
    (tmp_path / name).write_text(text)
    assert facts_of_folder(tmp_path) == expected


def test_the_metadata_of_a_gguf_file() -> None:
    fields = {
        "general.license": ["apache-2.0"], "general.languages": ["en", "fr"],
        "general.source.url": ["https://huggingface.co/someone/small-1B"],
    }  # fmt: skip
    facts = facts_of_fields(lambda name: fields.get(name, []))
    assert facts == {"license": "apache-2.0", "language": ["en", "fr"], "repository": "someone/small-1B"}
    assert facts_of_fields(lambda _: []) == {}
    assert facts_of_fields(lambda name: ["https://github.com/a/b"] if name.endswith("url") else []) == {}


def test_a_name_stays_on_its_line(tmp_path: Path) -> None:
    source: Any = SimpleNamespace(name="a\n---\n# b", path=Path("here"), facts={})
    text = model_card(source, [], Report("a", "out"), {}, tmp_path)
    assert "\n# a --- # b, quantized with quantc\n" in text
    assert ModelCard(text).data.to_dict() == {"library_name": "transformers", "tags": ["quantc"]}
