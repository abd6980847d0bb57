"""Copies that overtake an asynchronous product, found in what the compiler makes of a loop."""

import pytest

pytest.importorskip("triton")

from bench.offline.gates import overwritten

# A loop as Triton 3.6 and 3.8 write it for sm_90 in two stages. {slots} is 1 where something beside
# the product uses what was loaded, and dB was then wrong in places on an H200.
LOOP = """
%wide = ttg.local_alloc : () -> !ttg.memdesc<{slots}x32x64xbf16, #shared> loc(#1)
%narrow = ttg.local_alloc : () -> !ttg.memdesc<2x32x256xbf16, #shared> loc(#2)
%wide_1 = ttg.memdesc_index %wide[%c0] : !ttg.memdesc<{slots}x32x64xbf16, #shared>
%acc_5:5 = scf.for %i = %start to %stop step %c32_i32 iter_args(%acc = %zero) {{
  %wide_2 = ttg.memdesc_index %wide[%read] : !ttg.memdesc<{slots}x32x64xbf16, #shared>
  %wide_T = ttg.memdesc_trans %wide_2 {{}} : !ttg.memdesc<32x64xbf16, #shared>
  %narrow_1 = ttg.memdesc_index %narrow[%read] : !ttg.memdesc<2x32x256xbf16, #shared>
  %acc_1 = ttng.warp_group_dot %wide_T, %narrow_1, %acc {{isAsync = {asynchronous}}}
  %acc_2:3 = ttng.warp_group_dot_wait %acc_1, %wide_T, %narrow_1 {{pendings = 1 : i32}}
  %narrow_2 = ttg.memdesc_index %narrow[%fill] : !ttg.memdesc<2x32x256xbf16, #shared>
  %t_1 = ttg.async_copy_global_to_local %p_1, %wide_1 mask %m other %z
  %t_2 = ttg.async_copy_global_to_local %p_2, %narrow_2 mask %m other %z
}}
"""


@pytest.mark.parametrize(
    ("slots", "asynchronous", "expected"), [(1, "true", 1), (2, "true", 0), (1, "false", 0)]
)
def test_too_few_slots_are_found(slots: int, asynchronous: str, expected: int) -> None:
    assert overwritten(LOOP.format(slots=slots, asynchronous=asynchronous), 2) == expected


def test_another_stage_needs_another_slot() -> None:
    assert overwritten(LOOP.format(slots=2, asynchronous="true"), 3) == 2
