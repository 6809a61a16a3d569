"""Reading of optimised HLO: bytes, FLOPs and collectives of programs small enough to count by hand."""

import jax
import jax.numpy as jnp
import pytest

from jaxllm import hlo, hlo_cost

HEAD = "HloModule m, input_output_alias={ {0}: (1, {}, may-alias) }, entry_computation_layout={()->()}\n"


def cost(main, /, **computations):
    others = "".join(f"\n%{name} (p: f32[]) -> f32[] {{\n{text}\n}}\n" for name, text in computations.items())
    module = hlo.parse(f"{HEAD}{others}\nENTRY %main (p: f32[]) -> f32[] {{\n{main}\n}}\n")
    return hlo_cost.cost(module, trips=10)


def test_a_shape_is_as_large_as_it_lies_in_memory():
    (shape,) = hlo._shapes("bf16[2,8,64]{2,1,0:T(8,128)(2,1)S(1)}")
    assert shape == hlo.Shape("bf16", (2, 8, 64), (2, 1, 0), (8, 128), 1)
    assert (shape.nbytes, shape.memory_bytes()) == (2 * 8 * 128 * 2, 0)
    assert hlo.Shape("s4", (100,)).nbytes == 50
    assert hlo.Shape("f8e4m3fn", (3, 5)).nbytes == 15
    assert hlo.Shape("pred", (7,)).nbytes == 7


def test_a_matmul_reads_both_operands_and_writes_its_result():
    low, high = cost("""
  %x = f32[4,16]{1,0} parameter(0)
  %w = s8[32,16]{1,0} parameter(1)
  ROOT %y = f32[4,32]{1,0} convolution(%x, %w), dim_labels=bf_oi->bf, backend_config={"estimated_cycles":"70"}""")
    assert low == high
    assert low.memory_bytes == 4 * 16 * 4 + 32 * 16 + 4 * 32 * 4
    assert (low.flops, low.int8_flops, low.cycles) == (2 * 4 * 16 * 32, 0, 70)


def test_what_is_on_the_chip_costs_no_memory_traffic_and_a_prefetch_is_counted_once():
    low, _ = cost("""
  %w = s8[32,16]{1,0} parameter(0)
  %s = (s8[32,16]{1,0:S(1)}, s8[32,16]{1,0}, u32[]) copy-start(%w)
  %d = s8[32,16]{1,0:S(1)} copy-done(%s)
  ROOT %y = s8[32,16]{1,0:S(1)} negate(%d)""")
    assert (low.memory_bytes, low.copied_bytes) == (32 * 16, 0)


def test_slices_read_and_updates_write_what_they_touch():
    low, _ = cost(
        """
  %c = f32[1000,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %row = f32[1,8]{1,0} dynamic-slice(%c, %i, %i), dynamic_slice_sizes={1,8}
  ROOT %new = f32[1000,8]{1,0} fusion(%c, %row, %i), kind=kLoop, calls=%put""",
        put="""
  %a = f32[1000,8]{1,0} parameter(0)
  %b = f32[1,8]{1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %u = f32[1000,8]{1,0} dynamic-update-slice(%a, %b, %j, %j)""",
    )
    # The slice: 8 values read and written, and an index twice. The update: 8 read, 8 written, an index.
    assert low.memory_bytes == (32 + 32 + 8) + (32 + 32 + 4)


def test_what_is_read_after_it_was_updated_is_read():
    low, _ = cost(
        """
  %c = f32[1000,8]{1,0} parameter(0)
  %b = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %both = (f32[1000,8]{1,0}, f32[8]{0}) fusion(%c, %b, %i), kind=kLoop, calls=%put""",
        put="""
  %a = f32[1000,8]{1,0} parameter(0)
  %b = f32[1,8]{1,0} parameter(1)
  %j = s32[] parameter(2)
  %u = f32[1000,8]{1,0} dynamic-update-slice(%a, %b, %j, %j)
  %v = f32[8,1000]{0,1} bitcast(%u)
  %r = f32[8]{0} reduce(%v, %j), dimensions={1}
  ROOT %t = (f32[1000,8]{1,0}, f32[8]{0}) tuple(%u, %r)""",
    )
    assert low.memory_bytes == (32000 + 32 + 4) + (32 + 32)


def test_loops_count_as_often_as_they_run_and_conditionals_give_two_ends():
    low, high = cost(
        """
  %p = (f32[100]{0}) parameter(0)
  %w = (f32[100]{0}) while(%p), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %v = (f32[100]{0}) while(%w), condition=%cond, body=%body
  ROOT %c = (f32[100]{0}) conditional(%v, %v, %v), branch_computations={%body, %nothing}""",
        cond="  ROOT %q = pred[] parameter(0)",
        body="""
  %t = (f32[100]{0}) parameter(0)
  %x = f32[100]{0} get-tuple-element(%t), index=0
  %n = f32[100]{0} negate(%x)
  ROOT %r = (f32[100]{0}) tuple(%n)""",
        nothing="  ROOT %z = (f32[100]{0}) parameter(0)",
    )
    assert low.memory_bytes == 13 * 800
    assert high.memory_bytes == 14 * 800


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        ("all-reduce(%x), replica_groups={{0,1,2,3}}", 1.5),
        ("all-reduce(%x), replica_groups=[2,4]<=[8]", 1.5),
        ("all-reduce(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}", 1.5),
        ("all-gather(%x), replica_groups={{0,1}}", 0.5),
        ("reduce-scatter(%x), replica_groups={{0,1,2,3}}", 3.0),
        ("collective-permute(%x), source_target_pairs={{0,1}}", 1.0),
    ],
)
def test_collectives_are_counted_by_what_a_ring_sends(line, sent):
    low, _ = cost(f"  %x = f32[64]{{0}} parameter(0)\n  ROOT %y = f32[64]{{0}} {line}")
    assert low.collectives == {line.split("(")[0]: 1}
    assert (low.collective_bytes, low.wire_bytes) == (256, sent * 256)


def test_padding_in_a_window_is_no_work():
    """A batched matmul [B=4: 8x16 times 16x32] as the TPU compiler writes it: the batch is a window."""
    low, _ = cost(
        """
  %x = f32[4,8,16]{2,1,0} parameter(0)
  %w = f32[4,32,16]{2,1,0} parameter(1)
  ROOT %y = f32[4,8,32]{2,1,0} convolution(%x, %w), """
        "window={size=4 stride=3 pad=3_3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf"
    )
    assert low.flops == 2 * 4 * 8 * 16 * 32


def test_flops_and_aliases_of_a_program_of_xlas():
    def program(w, cache, x):
        return cache.at[3].set(x[0]), x @ w.T

    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((300, 64), (50, 64), (8, 64)))
    module = hlo.parse(jax.jit(program, donate_argnums=1).lower(*shapes).compile().as_text())
    low, _ = hlo_cost.cost(module)
    assert module.aliased == {1}
    assert 300 * 64 * 4 <= low.memory_bytes < 3 * 300 * 64 * 4
    assert low.copied_bytes < 50 * 64 * 4


def test_other_texts_are_refused():
    with pytest.raises(ValueError, match="no optimised HLO"):
        hlo.parse("module @jit_f {\n}\n")


@pytest.mark.parametrize(("first", "end", "step", "trips"), [(0, 4, 2, 2), (1, 8, 3, 3), ("%p", 4, 1, 10)])
def test_a_counter_between_constants_says_how_often_its_loop_runs(first, end, step, trips):
    begin = f"%first = u32[] constant({first})" if isinstance(first, int) else "%first = u32[] negate(%p)"
    low, _ = cost(
        f"""
  %p = u32[] parameter(0)
  {begin}
  %from = u32[] copy(%first)
  %x = f32[4]{{0:S(1)}} iota()
  %carry = (f32[4]{{0:S(1)}}, u32[]) tuple(%x, %from)
  ROOT %w = (f32[4]{{0:S(1)}}, u32[]) while(%carry), condition=%test, body=%turn""",
        test=f"""
  %c = (f32[4]{{0:S(1)}}, u32[]) parameter(0)
  %n = u32[] get-tuple-element(%c), index=1
  %end = u32[] constant({end})
  ROOT %more = pred[] compare(%n, %end), direction=LT""",
        turn=f"""
  %t = (f32[4]{{0:S(1)}}, u32[]) parameter(0)
  %v = f32[4]{{0:S(1)}} get-tuple-element(%t), index=0
  %i = u32[] get-tuple-element(%t), index=1
  %one = u32[] constant({step})
  %j = u32[] add(%i, %one)
  %y = f32[4]{{0:S(1)}} collective-permute(%v), source_target_pairs={{{{0,1}},{{1,0}}}}
  ROOT %next = (f32[4]{{0:S(1)}}, u32[]) tuple(%y, %j)""",
    )
    assert low.collectives == {"collective-permute": trips}
    assert low.wire_bytes == 16 * trips


def test_an_all_reduce_of_which_each_takes_a_part_scatters():
    low, _ = cost(
        """
  %x = f32[64,8]{1,0:S(1)} parameter(0)
  ROOT %y = f32[16,8]{1,0:S(1)} fusion(%x), kind=kCustom, calls=%scatter""",
        scatter="""
  %a = f32[64,8]{1,0} parameter(0)
  %i = s32[] constant(0)
  %sum = f32[64,8]{1,0} all-reduce(%a), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = f32[16,8]{1,0} dynamic-slice(%sum, %i, %i), dynamic_slice_sizes={16,8}""",
    )
    assert low.collectives == {"reduce-scatter": 1}
    assert low.collective_bytes == 16 * 8 * 4
    assert low.wire_bytes == 3 * 16 * 8 * 4  # of a ring of four: three parts of a quarter each
