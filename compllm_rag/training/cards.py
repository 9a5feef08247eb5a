"""What a run leaves behind for people: the plot of its curves and the model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compllm_rag.training.run_config import RunConfig

_TITLES = {
    "reader": "Reader adapter",
    "compressor": "Concept compressor",
    "deep": "Compressor of deep concepts",
}


def read_log(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records of steps and of looks at the held-out part; of a step that was repeated after a resume, the last one."""
    steps: dict[int, dict[str, Any]] = {}
    looks: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a line that a kill cut short
        (looks if "validation" in record else steps)[record["step"]] = record
    return [steps[k] for k in sorted(steps)], [looks[k] for k in sorted(looks)]


def plot_curves(out: Path) -> Path | None:
    """Draw loss and held-out numbers over steps into `curves.png`; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    steps, looks = read_log(out / "log.jsonl")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [record["loss"] for record in steps]
    left.plot([r["step"] for r in steps], losses, color="0.8", linewidth=0.8, label="one step")
    smooth, value = [], losses[0] if losses else 0.0
    for loss in losses:
        value += 0.04 * (loss - value)
        smooth.append(value)
    left.plot([r["step"] for r in steps], smooth, color="tab:blue", label="running mean")
    left.set(xlabel="step", ylabel="loss", title="Training")
    left.legend(frameon=False)
    names = list(looks[0]["validation"]) if looks else []
    percent = [name for name in names if "@" in name and not name.startswith("nll")]
    shown = percent or [name for name in names if name.startswith("nll")]
    for name in shown:
        values = [look["validation"].get(name) for look in looks]
        dashed = name.startswith(("pruned", "untrained"))
        right.plot(
            [look["step"] for look in looks], values, "--" if dashed else "o-", markersize=3, linewidth=1.2, label=name
        )
    right.set(xlabel="step", ylabel="recovered (%)" if percent else "NLL (nats per token)", title="Held-out questions")
    right.legend(frameon=False, fontsize="small")
    figure.savefig(out / "curves.png", dpi=130)
    return out / "curves.png"


def write_card(
    out: Path,
    *,
    kind: str,
    llm: str,
    data: list[str],
    skipped: list[tuple[str, str]],
    run: RunConfig,
    facts: dict[str, Any],
    hardware: str,
    command: str,
    date: str,
) -> Path:
    """Write `best/README.md` from the log of a run.

    Args:
        out: Folder of the run.
        kind: `reader`, `compressor` or `deep`.
        llm: The target LLM.
        data: Names of the data files.
        skipped: Rows left out, with reasons.
        run: How it was trained.
        facts: Further settings.
        hardware: What it ran on.
        command: What reproduces it.
        date: Of the last part of the run.
    """
    steps, looks = read_log(out / "log.jsonl")
    best = max(looks, key=lambda look: look["validation"]["score"]) if looks else None
    done = steps[-1] if steps else {"step": 0, "minutes": 0.0}
    lines = [
        f"# {_TITLES[kind]} for {llm}",
        "",
        "Made by compllm-rag (CompLLM, arXiv 2509.19228).",
        "",
        f"- **Target**: `{llm}`",
        f"- **Data**: {', '.join(data)}"
        + (f"; {len(skipped)} rows without context or answer left out" if skipped else ""),
        f"- **Training**: {done['step']} steps of {run.batch} examples, peak learning rate {run.lr:g}, "
        f"{done['minutes']:.0f} minutes on {hardware}, {date}",
        f"- **Settings**: `{json.dumps(facts)}`",
    ]
    if best is not None:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in best["validation"].items() if name != "score")
        lines.append(f"- **Held-out part of the training data**, step {best['step']} (these weights): {numbers}")
    if command:
        lines += ["", "Reproduce:", "", "```", command, "```"]
    path = out / "best" / "README.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
