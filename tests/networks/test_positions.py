import torch

from coalign.networks.positions import sincos_2d


def test_equals_mae(oracles):
    oracle = oracles("positions")
    torch.testing.assert_close(sincos_2d(4, 4, 16), oracle["mae_sincos.out.pos_4_16"], rtol=0, atol=1e-12)
    rows = oracle["mae_sincos.par.rows"]
    with_class_token = torch.cat([torch.zeros(1, 384, dtype=torch.float64), sincos_2d(14, 14, 384)])
    torch.testing.assert_close(with_class_token[rows], oracle["mae_sincos.out.pos_14_384_rows"], rtol=0, atol=1e-12)


def test_equals_mocov3_with_its_column_major_order(oracles):
    oracle = oracles("positions")
    for rows, columns, name in ((4, 4, "pos_4x4_16"), (3, 5, "pos_3x5_16")):
        theirs = oracle[f"mocov3_sincos.out.{name}"][0, 1:]  # without the row of the class token
        ours = sincos_2d(rows, columns, 16).view(rows, columns, 16).transpose(0, 1).reshape(-1, 16)
        torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=1e-6)
