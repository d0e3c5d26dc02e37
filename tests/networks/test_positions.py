import torch

from coalign.networks.positions import resize_positions, sincos_2d


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


def test_resize_positions_interpolates_the_grid():
    """A table that is linear in row and column stays linear on a finer grid, and its class token is unchanged."""
    side = torch.arange(4, dtype=torch.float64)
    grid = torch.stack([side.repeat(4), side.repeat_interleave(4)], dim=1)  # [16, 2]: column, row
    table = torch.cat([torch.tensor([[7.0, 8.0]], dtype=torch.float64), grid])
    finer = resize_positions(table, 1 + 64)
    assert finer[0].tolist() == [7, 8]
    columns = finer[1:, 0].view(8, 8)
    torch.testing.assert_close(columns, columns[:1].expand(8, 8))
    inner = columns[0, 2:6]  # away from the border, where values are extrapolated
    torch.testing.assert_close(inner.diff(), torch.full((3,), 0.5, dtype=torch.float64), atol=0.05, rtol=0)
    torch.testing.assert_close(finer[1:, 1].view(8, 8).T, columns)
    assert resize_positions(table, 17) is table
