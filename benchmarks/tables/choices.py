"""One line of figures for each default on the page of decisions, the default in bold."""

from __future__ import annotations

from .results import find, load, rounded, uniform

# name -> (what is compared, label -> method of perplexity.json, the default's label). SmolLM2-135M at 3 bits.
GPTQ = "KL divergence of plain GPTQ"
HEAD_WIDTHS = (4, 3)  # of the blocks
PRESET_ROWS = {
    "method": ("KL divergence", {"rtn": "rtn", "gptq": "fast"}, "gptq"),
    "online": (
        GPTQ,
        {"no rotation": "plain-gptq", "folded into the weights": "gptq-rotate-folded", "online": "gptq-rotate"},
        "online",
    ),
    "refine": (GPTQ, {"no rounds": "plain-gptq", "2 rounds": "gptq-refine"}, "2 rounds"),
    "importance": (GPTQ, {"rows count alike": "plain-gptq", "weighed": "gptq-importance"}, "rows count alike"),
    "group_channels": (
        GPTQ,
        {"along inputs": "plain-gptq", "whichever loses less": "gptq-group-channels"},
        "along inputs",
    ),
    "compensate": (
        GPTQ,
        {"no low-rank part (3.30 bits)": "plain-gptq", "with it (3.67 bits)": "gptq-compensate"},
        "no low-rank part (3.30 bits)",
    ),
    "presets": ("KL divergence", {"fast": "fast", "balanced": "balanced", "best": "best"}, "balanced"),
}


def line(name: str) -> str:
    """Return the figures of one choice as a sentence, with the file that they are from."""
    if name in PRESET_ROWS:
        return _presets(*PRESET_ROWS[name])
    if name in SPECIAL:
        return SPECIAL[name]()
    choice = load("choices.json")["choices"][name]
    return _sentence(choice["measured"], choice["values"], choice["default"], "choices.json")


def _presets(what: str, methods: dict[str, str], default: str) -> str:
    rows = {label: uniform("SmolLM2-135M", 3, method) or {} for label, method in methods.items()}
    names = {label: f"{label}, {row['cpu_seconds']:.0f} CPU s" for label, row in rows.items()}
    values = {names[label]: row["mean_kl"] for label, row in rows.items()}
    return _sentence(f"{what}, SmolLM2-135M, 3 bits, groups of 64", values, names[default], "perplexity.json")


def _sentence(what: str, values: dict[str, float], default: str, file: str) -> str:
    numbers = {label: f"{label}: {float(rounded(value)):g}" for label, value in values.items()}
    numbers[default] = f"**{numbers[default]}**"
    return f"{what[0].upper()}{what[1:]}. {'; '.join(numbers.values())} (`benchmarks/results/{file}`)."


def _scale() -> str:
    file = "scale_search_smollm2.json"
    rows = {row["search"]: row["mean_kl"] for row in load(file)["rows"] if row["method"] == "gptq"}
    values = {"no scaling": rows["none"], "AWQ's search": rows["published_scale"], "`scale`": rows["scale"]}
    return _sentence("KL divergence of plain GPTQ, SmolLM2-135M, 3 bits, 16 windows", values, "`scale`", file)


def _estimator() -> str:
    rows = [row for row in load("sensitivity.json") if row["text"].startswith("wikitext2")]
    values = {f"`{row['estimator']}`": row["rank_correlation"] for row in rows}
    what = "rank correlation of predicted and measured losses, stories15M, 3 bits"
    return _sentence(what, values, "`fisher`", "sensitivity.json")


def _samples() -> str:
    times = {row["samples"]: row["quantize"]["cpu_seconds"] for row in load("quantize_time.json")["rows"]}
    few = find("builtin_and_head8.json", model="SmolLM2-135M", bits=3, method="balanced") or {}
    many = uniform("SmolLM2-135M", 3, "balanced") or {}
    labels = [f"{count} windows, {times[count]:.0f} CPU s" for count in (16, 64)]
    values = dict(zip(labels, (few["mean_kl"], many["mean_kl"]), strict=True))
    what = "KL divergence of `balanced`, SmolLM2-135M, 3 bits (seconds of plain GPTQ)"
    return _sentence(what, values, labels[1], "perplexity.json`, `builtin_and_head8.json`, `quantize_time.json")


def _head_bits() -> str:
    added: dict[str, list[str]] = {}
    for row in sorted(load("head_bits.json")["rows"], key=lambda row: (row["model"], -row["bits"])):
        if row["bits"] in HEAD_WIDTHS:
            added.setdefault(row["model"], []).append(f"{100 * row['share_of_head']:.2f}")
    shares = "; ".join(f"{model}: {' and '.join(shares)} %" for model, shares in added.items())
    what = "Added by 8 bits for embedding and head to the KL divergence of `fast` at 4 and 3 bits"
    return f"{what}. {shares} (`benchmarks/results/head_bits.json`)."


def _preset_decode() -> str:
    files = {"AVX-512": "cpu_decode_presets.json", "AVX2": "cpu_decode_presets_avx2.json"}
    names = list[str]()
    for level, file in files.items():
        ratios = {row["model"]: row["x original"] for row in load(file)["rows"]}
        for loading, shown in (("plain", "plain"), ("compile=True", "compiled")):
            pair = [f"{preset} {ratios[f'{preset}, {loading}']:.2f}" for preset in ("fast", "balanced")]
            names.append(f"{level}, {shown}: {', '.join(pair)}")
    what = "Tokens a second, times those of the original, SmolLM2-135M at 4 bits, two threads"
    return f"{what}. {'; '.join(names)} (`benchmarks/results/{'`, `'.join(files.values())}`)."


def _code() -> str:
    """Return what trellis codes lose beside grids, and how fast they decode beside grids of 4 bits."""
    losses = list[str]()
    for bits in (4, 3, 2):
        grid = uniform("SmolLM2-135M", bits, "balanced") or {}
        trellis = find("trellis.json", model="SmolLM2-135M", bits=bits, method="balanced") or {}
        values = [float(rounded(row["mean_kl"])) for row in (grid, trellis)]
        losses.append(f"{bits} bits {values[0]:g} and {values[1]:g}")
    ratios = {row["model"]: row["x original"] for row in load("cpu_decode_trellis_avx2.json")["rows"]}
    plain, compiled = (ratios[f"trellis3, {way}"] / ratios[f"grid4, {way}"] for way in ("plain", "compile=True"))
    what = "KL divergence of `balanced`, SmolLM2-135M, **grids in groups of 64** and trellis codes"
    decode = "Tokens a second in 3 bits of trellis codes, times those in 4 bits of a grid, AVX2, two threads"
    named = "`, `".join(("perplexity.json", "trellis.json", "cpu_decode_trellis_avx2.json"))
    return (
        f"{what}. {'; '.join(losses)}. {decode}: {plain:.2f}, compiled {compiled:.2f} (`benchmarks/results/{named}`)."
    )


SPECIAL = {
    "code": _code,
    "scale": _scale,
    "estimator": _estimator,
    "samples": _samples,
    "head_bits": _head_bits,
    "preset_decode": _preset_decode,
}
