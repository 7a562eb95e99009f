"""Training steps compiled for TPU slices that are not there: memory, the MFU they allow, time.

XLA's compiler for TPU (libtpu, `pip install 'vidsim[tpu]'`) compiles on this machine the steps of
`experiments/dit_*.py` and of an autoencoder, each through `vidsim compile` in a process of its own.
The peer is MaxDiffusion: its step of Wan's 14B on the same 8 chips and tokens peaks at 40.85 GiB a
device, with bfloat16 weights and moments and no averages. The claims: ours, with float32 weights,
peaks below 40 GiB; 7B and 30B fit their slices with rows of 131,072 tokens and gather no activation
over fsdp; the roofline of 7B allows 55 % MFU or more; 48 layers compile in 1.3 times the time of 12
or less; and an autoencoder's step fits, with a tenth of the memory to spare, as it is compiled with
--quick: without, 81x480x832 took most of an hour and peaked at 85.8 GiB in place of 79.4.

    python -m benchmarks.compile --table

prints a table over all experiments of transformers instead, in markdown.
"""

import importlib.util
import json
import subprocess
import sys

from absl import app, flags

from benchmarks import ROOT, claim, say

TABLE = flags.DEFINE_bool("table", False, "Prints a table over all experiments instead of claims.")
EXPERIMENTS = ROOT / "experiments"
DEPTHS = (12, 48)
CLIPS = ("81x480x832", "1x2048x2048")
# 16 chips, each of 4 a quarter of the rows of a clip's frames.
VAE_FLAGS = (
    "--model=vae",
    "--quick",
    "--topology=v5p:4x4x1",
    "--config.mesh.fsdp=4",
    "--config.mesh.sequence=4",
)


def compiled(experiment: str, *flags: str) -> dict | None:
    """The last line of `vidsim compile`; None without its compiler."""
    if importlib.util.find_spec("libtpu") is None:
        return None
    command = ("-m", "vidsim.cli.main", "compile", f"--config=experiments/{experiment}.py")
    say(" ".join(("vidsim", *command[2:], *flags)))
    done = subprocess.run([sys.executable, *command, *flags], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"vidsim compile of {experiment} ended with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def beside(told: dict | None) -> dict:
    """What of a compiled experiment stands beside its claim."""
    if told is None:
        return {"missing": "libtpu; pip install 'vidsim[tpu]'"}
    step = told["step"]
    collectives = step.get("collectives", ())
    facts = {
        "fits": told["fits"],
        "topology": told["topology"],
        "mesh": told["mesh"],
        "batch": told["batch"],
        "parameters": told["parameters"],
        "state_gib": told["state_gib"],
        "memory_gib": step.get("memory_gib"),
        "mfu": step.get("mfu"),
        "seconds": step.get("seconds"),
        "compile_seconds": step["compile_seconds"],
    }
    seconds = sum(one["seconds"] for one in collectives)
    if seconds:
        facts["share_of_exchanges_hidden"] = sum(one["hidden"] for one in collectives) / seconds
        facts["activations_gathered_over_fsdp"] = step["activations_gathered"]
    return facts


def peak(told: dict | None) -> float | None:
    """GiB of a device; None where the compiler did not say what it needs."""
    return told and told["step"].get("memory_gib", {}).get("peak")


def gathered(told: list[dict | None]) -> float | None:
    """Kinds of activations that are gathered over fsdp; None where a step was not compiled."""
    lists = [one and one["step"].get("activations_gathered") for one in told]
    return None if None in lists else float(sum(map(len, lists)))


def table() -> str:
    """All experiments of transformers on their slices, smallest first."""
    found = [compiled(path.stem) for path in EXPERIMENTS.glob("dit_*.py")]
    if None in found:
        raise RuntimeError(beside(None)["missing"])
    lines = [
        "| experiment | parameters | slice | a step | GiB a device: peak (of), state "
        "| least ms a step: roofline, scheduled | MFU % that these allow |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_line(told) for told in sorted(found, key=lambda told: told["parameters"])]
    return "\n".join(lines)


def _line(told: dict) -> str:
    step = told["step"]
    memory, state = step.get("memory_gib"), sum(told["state_gib"].values())
    needed = f"{memory['peak']:.1f} ({memory['limit']:.0f})" if memory else "too much"
    seconds, mfu = step.get("seconds"), step.get("mfu")
    times = shares = "does not fit"
    if seconds:
        times = f"{1e3 * seconds['roofline']:.0f}, {1e3 * seconds['scheduled']:.0f}"
        shares = f"{100 * mfu['roofline']:.0f}, {100 * mfu['scheduled']:.0f}"
    cells = (
        told["experiment"],
        f"{told['parameters'] / 1e6:,.0f}M",
        told["topology"],
        told["batch"],
        f"{needed}, {state:.1f}",
        times,
        shares,
    )
    return f"| {' | '.join(cells)} |"


def main() -> list[dict]:
    wan, averaged = (
        compiled("dit_14b_wan", f"--config.dit.optimizer.ema_sigma_rels={widths}")
        for widths in ("()", "(0.05,0.1)")
    )
    rows = [
        claim(
            "compile.wan14b_peak_gib",
            peak(wan),
            goal=40.0,
            better="lower",
            beside={
                "MaxDiffusion, bfloat16 weights and moments, no averages": 40.85,
                "without averages": beside(wan),
                "with two averages": beside(averaged),
            },
        )
    ]
    large = {name: compiled(name) for name in ("dit_7b", "dit_30b")}
    for name, told in large.items():
        rows.append(
            claim(
                f"compile.{name}_fits",
                told and float(told["fits"]),
                goal=1.0,
                better="higher",
                beside=beside(told),
            )
        )
        if name == "dit_7b":
            roofline = told and told["step"].get("mfu", {"roofline": 0.0})["roofline"]
            rows.append(
                claim(
                    "compile.dit_7b_roofline_mfu",
                    roofline,
                    goal=0.55,
                    better="higher",
                    beside=beside(told),
                )
            )
    rows.append(
        claim(
            "compile.activations_gathered",
            gathered(list(large.values())),
            goal=0.0,
            better="lower",
            beside={name: beside(told) for name, told in large.items()},
        )
    )
    depths = [compiled("dit_7b", f"--config.dit.model.depth={depth}") for depth in DEPTHS]
    seconds = [told and told["step"]["compile_seconds"] for told in depths]
    rows.append(
        claim(
            "compile.depth_time_ratio",
            seconds[1] / seconds[0] if all(seconds) else None,
            goal=1.3,
            better="lower",
            beside={f"seconds of {d} layers": s for d, s in zip(DEPTHS, seconds, strict=True)},
        )
    )
    vae = [compiled("vae_4x16x16_48", f"--clip={clip}", *VAE_FLAGS) for clip in CLIPS]
    rows.append(
        claim(
            "compile.vae_fits",
            float(all(told["fits"] for told in vae)) if all(vae) else None,
            goal=1.0,
            better="higher",
            beside={clip: beside(told) for clip, told in zip(CLIPS, vae, strict=True)},
        )
    )
    return rows


if __name__ == "__main__":
    app.run(lambda _: print(table()) if TABLE.value else main() and None)
