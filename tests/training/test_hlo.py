"""What is read from a compiled program, beside what the program is known to do."""

import textwrap

import pytest

from vidsim.training import hlo

# Prints for a program on 4 x 2 devices, which repeats its exchanges in a loop of 5, a row for each
# kind of collective and group of devices: how often, bytes sent; and FLOPs of a device.
CODE = """
    import collections, functools, json
    import jax, jax.numpy as jnp
    from jax.sharding import PartitionSpec as P
    from vidsim.training import hlo

    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("a", "b"), out_specs=P("a", "b"))
    def program(x):  # [8, 16] of each device

        def body(x, _):
            whole = jax.lax.all_gather(x, "a", tiled=True)  # [32, 16]
            y = whole.T @ jnp.sin(whole)  # [16, 16]
            y = jax.lax.psum(y, ("a", "b"))
            x = x @ y
            x = jax.lax.all_to_all(x, "a", 0, 1, tiled=True)  # [2, 64]
            x = jax.lax.all_to_all(x, "a", 1, 0, tiled=True)
            x = jax.lax.ppermute(x, "b", [(0, 1), (1, 0)])
            return x, None

        return jax.lax.scan(body, x, length=5)[0]

    text = jax.jit(program).lower(jnp.zeros((32, 32))).compile().as_text()
    found = collections.Counter()
    flops = 0.0
    for one in hlo.operations(text):
        flops += one.times * one.flops
        if one.collective:
            groups = one.collective.groups
            pairs = sorted(groups)[0] if one.collective.kind == "collective-permute" else groups[0]
            found[f"{one.collective.kind} {pairs}", "times"] += one.times
            found[f"{one.collective.kind} {pairs}", "sent"] += one.times * one.collective.sent
    print(json.dumps({"flops": flops, **{" ".join(k): v for k, v in found.items()}}))
"""


def test_loops_products_and_exchanges_of_a_program_are_counted(new_process):
    found = new_process(
        "-c", textwrap.dedent(CODE), JAX_NUM_CPU_DEVICES="8", JAX_PLATFORMS="cpu"
    ).summary
    block = 4 * 8 * 16  # bytes
    assert found.pop("flops") == 5 * 2 * (32 * 16 * 16 + 8 * 16 * 16)
    assert found == {
        "all-gather (0, 2, 4, 6) times": 5,
        "all-gather (0, 2, 4, 6) sent": 5 * 3 * block,
        "all-reduce (0, 1, 2, 3, 4, 5, 6, 7) times": 5,
        "all-reduce (0, 1, 2, 3, 4, 5, 6, 7) sent": 5 * 2 * 7 / 8 * 4 * 16 * 16,
        "all-to-all (0, 2, 4, 6) times": 10,
        "all-to-all (0, 2, 4, 6) sent": 10 * 3 / 4 * block,
        "collective-permute (0, 1) times": 5,
        "collective-permute (0, 1) sent": 5 * block,
    }


# As XLA writes it for TPU, shortened.
TPU = """\
HloModule jit_step, is_scheduled=true

%all-reduce-scatter.1 (input: f32[64,128]) -> f32[16,128] {
  %input = f32[64,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.5 = f32[64,128]{1,0:T(8,128)} all-reduce(%input), channel_id=4, \
replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %cut = f32[16,128]{1,0:T(8,128)} dynamic-slice(%all-reduce.5, %zero, %zero), \
dynamic_slice_sizes={16,128}
}

%slice_and_product (stack: bf16[12,64,128], row: bf16[32,64]) -> bf16[32,128] {
  %stack = bf16[12,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %layer = s32[] constant(3)
  %one = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%stack, %layer, %layer, %layer), \
dynamic_slice_sizes={1,64,128}
  %weights = bf16[64,128]{1,0:T(8,128)(2,1)} bitcast(%one)
  %row = bf16[32,64]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %convolution.1 = bf16[32,128]{1,0:T(8,128)(2,1)} convolution(%row, %weights), \
dim_labels=bf_io->bf
}

%body (state: (s32[], bf16[12,64,128], bf16[32,64])) -> (s32[], bf16[12,64,128], bf16[32,64]) {
  %state = (s32[], bf16[12,64,128]{2,1,0}, bf16[32,64]{1,0:S(1)}) parameter(0)
  %weights.1 = bf16[12,64,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %row.1 = bf16[32,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%state), index=2
  %start = (bf16[32,64]{1,0}, bf16[128,64]{1,0}, u32[], u32[]) all-gather-start(%row.1), \
replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=2] {'axis_1'}, dimensions={0}
  %kernel = (f32[8]{0}, bf16[32,64]{1,0:S(1)}) custom-call(%row.1), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={

}}, backend_config={"cost_estimate":{"flops":"4096","bytes_accessed":"64"}}
  %product = bf16[32,128]{1,0:T(8,128)(2,1)} fusion(%weights.1, %row.1), kind=kOutput, \
calls=%slice_and_product
  %done = bf16[128,64]{1,0} all-gather-done(%start)
  ROOT %next = (s32[], bf16[12,64,128]{2,1,0}, bf16[32,64]{1,0:S(1)}) tuple(%state)
}

%condition (state: (s32[], bf16[12,64,128], bf16[32,64])) -> pred[] {
  %state.1 = (s32[], bf16[12,64,128]{2,1,0}, bf16[32,64]{1,0:S(1)}) parameter(0)
  %counter = s32[] get-tuple-element(%state.1), index=0
  %rounds = s32[] constant(12)
  ROOT %lt = pred[] compare(%counter, %rounds), direction=LT
}

ENTRY %main (a: f32[64,128]) -> f32[16,128] {
  %a = f32[64,128]{1,0:T(8,128)} parameter(0)
  %begin = (s32[], bf16[12,64,128]{2,1,0}, bf16[32,64]{1,0:S(1)}) tuple(%a)
  %loop = (s32[], bf16[12,64,128]{2,1,0}, bf16[32,64]{1,0:S(1)}) while(%begin), \
condition=%condition, body=%body
  ROOT %scattered = f32[16,128]{1,0:T(8,128)} fusion(%a), kind=kCustom, \
calls=%all-reduce-scatter.1
}
"""


SPLASH = """\
ENTRY %main (a: s32[1,4,2]) -> bf16[8,512,128] {
  %blocks = s32[1,4,2]{2,1,0} parameter(0)
  %q = bf16[8,512,128]{2,1,0} parameter(1)
  %k = bf16[8,256,128]{2,1,0} parameter(2)
  ROOT %splash_mha_KIND_segmented.3 = bf16[8,512,128]{2,1,0} custom-call(%blocks, %blocks, %q, %k, \
/*index=4*/%k), custom_call_target="tpu_custom_call"
}
"""


@pytest.mark.parametrize(("kind", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4)])
def test_attention_costs_its_products_over_all_blocks(kind, products):
    (kernel,) = hlo.operations(SPLASH.replace("KIND", kind))
    assert kernel.flops == products * 2 * 8 * 512 * 256 * 128


def test_a_program_of_a_tpu_is_read():
    gather, kernel, product, scatter = sorted(
        hlo.operations(TPU), key=lambda one: (one.times == 1, one.flops)
    )
    assert [one.times for one in (gather, kernel, product, scatter)] == [12, 12, 12, 1]
    assert (kernel.flops, kernel.bytes) == (4096, 64)
    assert product.flops == 2 * 32 * 64 * 128
    # Of the stack the slice of one layer; the row is in the small memory.
    assert product.bytes == 2 * (64 * 128 + 32 * 128)
    assert gather.collective.groups == ((0, 2, 4, 6),)
    assert gather.collective.sent == 2 * 128 * 64 * 3 / 4
    assert gather.asynchronous and gather.hidden_by == (kernel, product)
    assert scatter.collective.kind == "reduce-scatter"
    assert scatter.collective.sent == 4 * 64 * 128 * 3 / 4
    assert not scatter.asynchronous


# A gather that goes on in the steps of another fusion, as XLA writes it for TPU, shortened.
CHAIN = """\
%begin (part: bf16[32,64]) -> (bf16[32,64], bf16[128,64], u32[]) {
  %part = bf16[32,64]{1,0} parameter(0)
  %all-gather.1 = bf16[128,64]{1,0} all-gather(%part), replica_groups={{0,1,2,3}}, dimensions={0}, \
frontend_attributes={chain_id="7"}
  ROOT %started = (bf16[32,64]{1,0}, bf16[128,64]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%go_on (part.1: bf16[32,64], whole: bf16[128,64], x: bf16[16,64], w: bf16[64,8]) -> \
(bf16[16,8], bf16[32,64], bf16[128,64], bf16[128,64]) {
  %x = bf16[16,64]{1,0} parameter(2)
  %w = bf16[64,8]{1,0} parameter(3)
  %product = bf16[16,8]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  %part.1 = bf16[32,64]{1,0} parameter(0)
  %whole = bf16[128,64]{1,0} parameter(1)
  %all-gather.2 = bf16[128,64]{1,0} all-gather(%part.1), replica_groups={{0,1,2,3}}, \
dimensions={0}, frontend_attributes={chain_id="7"}
  ROOT %both = (bf16[16,8]{1,0}, bf16[32,64]{1,0}, bf16[128,64]{1,0}, bf16[128,64]{1,0}) \
tuple(%product, %part.1, %whole, %all-gather.2)
}

%end (part.2: bf16[32,64], whole.1: bf16[128,64]) -> bf16[128,64] {
  %part.2 = bf16[32,64]{1,0} parameter(0)
  %whole.1 = bf16[128,64]{1,0} parameter(1)
  %all-gather.3 = bf16[128,64]{1,0} all-gather(%part.2), replica_groups={{0,1,2,3}}, \
dimensions={0}, frontend_attributes={chain_id="7"}
  ROOT %gathered = bf16[128,64]{1,0} custom-call(%part.2, %whole.1, %all-gather.3), \
custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: bf16[32,64], x: bf16[16,64], w: bf16[64,8]) -> bf16[128,64] {
  %p = bf16[32,64]{1,0} parameter(0)
  %x.1 = bf16[16,64]{1,0} parameter(1)
  %w.1 = bf16[64,8]{1,0} parameter(2)
  %start = (bf16[32,64]{1,0}, bf16[128,64]{1,0}, u32[]{:S(2)}) fusion(%p), kind=kCustom, \
calls=%begin
  %held = bf16[32,64]{1,0} get-tuple-element(%start), index=0
  %half = bf16[128,64]{1,0} get-tuple-element(%start), index=1
  %beside = bf16[16,64]{1,0} negate(%x.1)
  %step = (bf16[16,8]{1,0}, bf16[32,64]{1,0}, bf16[128,64]{1,0}, bf16[128,64]{1,0}) \
fusion(%held, %half, %x.1, %w.1), kind=kOutput, calls=%go_on
  %held.1 = bf16[32,64]{1,0} get-tuple-element(%step), index=1
  %half.1 = bf16[128,64]{1,0} get-tuple-element(%step), index=2
  ROOT %done = bf16[128,64]{1,0} fusion(%held.1, %half.1), kind=kCustom, calls=%end
}
"""


def test_a_gather_in_the_steps_of_a_fusion_is_one_and_hidden_by_them_alone():
    negated, step, gather = hlo.operations(CHAIN)
    assert negated.collective is None and step.collective is None
    assert step.flops == 2 * 16 * 64 * 8
    # What the gather hands on is neither read nor written by the step.
    assert step.bytes == 2 * (16 * 64 + 64 * 8 + 16 * 8)
    assert gather.collective.kind == "all-gather"
    assert gather.collective.sent == 2 * 128 * 64 * 3 / 4
    assert gather.asynchronous and gather.hidden_by == (step,)


def test_a_gather_that_ends_in_the_next_round_counts():
    begins = CHAIN.replace("ROOT %done = bf16[128,64]{1,0} fusion(%held.1, %half.1), ", "").replace(
        "kind=kCustom, calls=%end\n", ""
    )
    assert "%done" not in begins
    *_, gather = hlo.operations(begins)
    assert gather.collective.sent == 2 * 128 * 64 * 3 / 4


def test_a_fusion_of_several_chains_is_refused():
    second = 'frontend_attributes={chain_id="8"}\n  ROOT %both'
    several = CHAIN.replace('frontend_attributes={chain_id="7"}\n  ROOT %both', second)
    several = several.replace(
        "  %x = bf16[16,64]{1,0} parameter(2)\n",
        "  %x = bf16[16,64]{1,0} parameter(2)\n"
        '  %other = bf16[16,64]{1,0} negate(%x), frontend_attributes={chain_id="7"}\n',
    )
    with pytest.raises(ValueError, match="fusion step is of several chains"):
        list(hlo.operations(several))


@pytest.mark.parametrize(
    ("written", "group"),
    [
        ("replica_groups={{0,3},{1,2}}, dimensions={0}", (0, 3)),
        ("replica_groups=[2,4]<=[8], dimensions={0}", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['x'=2,'y'=2,'z'=2] {'x','z'}", (0, 1, 4, 5)),
        ("replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x'}", (0, 1)),
    ],
)
def test_groups_of_devices_are_read_in_every_form(written, group):
    assert hlo.first_group(written) == group


@pytest.mark.parametrize(
    ("attributes", "left", "right", "out", "products"),
    [
        # 3 taps over 8 positions with zeros around: two of the 24 products meet them.
        ("window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", "2,8,5", "3,5,7", "2,8,7", 22 * 70),
        # A batched matrix product: a window as long as the batch, of which one tap meets each.
        (
            "window={size=8 stride=7 lhs_dilate=8}, dim_labels=b0f_o0i->0bf",
            "4,8,5",
            "7,8,5",
            "8,4,7",
            8 * 4 * 7 * 5,
        ),
        ("dim_labels=bf_io->bf", "4,5", "5,7", "4,7", 4 * 5 * 7),
    ],
)
def test_only_taps_that_meet_an_input_are_counted(attributes, left, right, out, products):
    text = f"""\
ENTRY %main (a: f32[{left}], b: f32[{right}]) -> f32[{out}] {{
  %a = f32[{left}]{{0}} parameter(0)
  %b = f32[{right}]{{0}} parameter(1)
  ROOT %c = f32[{out}]{{0}} convolution(%a, %b), {attributes}
}}
"""
    (one,) = hlo.operations(text)
    assert one.flops == 2 * products
