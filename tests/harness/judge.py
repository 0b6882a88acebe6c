"""When an answer is right: against PyTorch, and against float64."""

import torch

# Half a unit in the last place, relative: what rounding to the type may cost.
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11,
            torch.bfloat16: 2.0**-8}
# Half of the smallest subnormal.
SMALLEST = {torch.float64: 0.0, torch.float32: 0.0, torch.float16: 2.0**-25,
            torch.bfloat16: 2.0**-134}


def largest(tensor):
    """The largest finite magnitude, 0 where there is none."""
    if tensor is None:
        return 0.0
    finite = tensor[torch.isfinite(tensor)].double().abs()
    return finite.max().item() if finite.numel() else 0.0


def same_specials(test, got, expected, what):
    """NaN where NaN is due, and each infinity with its sign."""
    got, expected = got.double(), expected.double()
    for name, mask in (("NaN", torch.isnan), ("+Inf", torch.isposinf), ("-Inf", torch.isneginf)):
        a, b = mask(got), mask(expected)
        test.assertTrue(torch.equal(a, b),
                        f"{what}: {name} at {a.nonzero().tolist()[:4]}, "
                        f"due at {b.nonzero().tolist()[:4]}")


def error(got, expected):
    """The largest deviation where both are finite."""
    got, expected = got.double(), expected.double()
    finite = torch.isfinite(got) & torch.isfinite(expected)
    return (got - expected)[finite].abs().max().item() if finite.any() else 0.0


def judge(test, what, got, exact, scale, peer=None, tolerance=None):
    """`got` is as near to `exact` (float64) as its type and PyTorch allow.

    scale      what errors are relative to
    peer       PyTorch's answer, computed in the type of the state: we may not be
               further from `exact` than it is (or 1e-6 of the scale, whichever is
               larger), and agree with it within `tolerance` of the scale beside
               its own error
    """
    test.assertEqual(got.shape, exact.shape, what)
    # In the type of the answer: float16 ends at 65504.
    same_specials(test, got, (exact if peer is None else peer).to(got.dtype), what)
    ours = error(got, exact)
    if got.dtype in (torch.float16, torch.bfloat16):
        # The peer has no such rounding, so float64 alone is the judge: one rounding of
        # the exact answer to the half type, and the float32 arithmetic before it.
        slack = ROUNDING[got.dtype] * exact.abs() * 1.001 + SMALLEST[got.dtype] + 2e-6 * scale
        over = (got.double() - exact).abs() - slack
        over = over[torch.isfinite(over)]
        test.assertTrue(over.numel() == 0 or over.max().item() <= 0,
                        f"{what}: {got.dtype} off by {ours:.3g}, scale {scale:.3g}")
        return
    # Against float64 itself the judge is no better than the judged.
    floor = (1e-6 if got.dtype == torch.float32 else 1e-10) * scale
    theirs = error(peer, exact) if peer is not None else 0.0
    test.assertLessEqual(ours, max(theirs, floor),
                         f"{what}: off by {ours:.3g} from float64, PyTorch by {theirs:.3g}, "
                         f"scale {scale:.3g}")
    if peer is not None:
        test.assertLessEqual(error(got, peer), tolerance * scale + theirs,
                             f"{what}: differs from PyTorch, scale {scale:.3g}")
