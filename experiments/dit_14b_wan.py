"""The shape of Wan 2.1's 14B on 8 chips of TPU v5p, beside MaxDiffusion's (arXiv:2503.20314).

    vidsim compile --config=experiments/dit_14b_wan.py

40 layers of width 5120, and as many parameters as Wan's with its cross-attention: here prompts are
in the row. Two clips of 81 x 720 x 1280 are 2 x 75,600 tokens at Wan's stride of 4 x 16 x 16 pixels
a token. MaxDiffusion's step at these peaks at 40.85 GiB a device, with weights and moments in
bfloat16 and no averages of the parameters. Here weights and moments are float32, without averages,
either, and the step peaks at 39.6 GiB. The row is for this comparison: to be trained on such clips
whole it would have to hold a prompt as well. What is not named here is as in `dit_7b.py`.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

BASE = pathlib.Path(__file__).with_name("dit_7b.py")


def get_config() -> ConfigDict:
    config = runpy.run_path(str(BASE))["get_config"]()
    config.name = "dit_14b_wan"
    config.topology = "v5p:2x2x2"
    config.mesh.update(fsdp=2, sequence=4)
    config.dit.model.update(width=5120, depth=40, heads=40, mlp_hidden=16_000, remat="full")
    config.dit.pack.update(lengths=(75_600,), rows=2, max_segments=1)
    config.dit.earlier = ()
    config.dit.optimizer.update(ema_sigma_rels=())
    return config
