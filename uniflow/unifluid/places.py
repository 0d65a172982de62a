"""Where image tokens stand in pictures of several sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Grid = tuple[int, int]  # lines of image tokens, and tokens a line


class GridEmbedding(nn.Module):
    """The embedding of a place in one of several grids: the sum of its line's, its column's and its grid's.

    That of the grid says how large the picture is, which line and column alone do not.

    Args:
        grids: different ones.
        width: D.
    """

    def __init__(self, grids: Sequence[Grid], width: int) -> None:
        super().__init__()
        self.known = {grid: number for number, grid in enumerate(grids)}
        lines, columns = map(max, zip(*grids, strict=True))
        self.lines = nn.Parameter(torch.empty(lines, width))
        self.columns = nn.Parameter(torch.empty(columns, width))
        self.grids = nn.Parameter(torch.empty(len(grids), width))

    def start(self, std: float) -> None:
        """Begin anew, so that a place's embedding has this standard deviation."""
        for table in self.parameters():
            nn.init.normal_(table, std=std / 3**0.5)

    def forward(self, places: Tensor, grid: Grid) -> Tensor:
        """Embeddings [..., D] of places in raster order, int64 [...], of a grid that is known."""
        line, column = places // grid[1], places % grid[1]
        return self.lines[line] + self.columns[column] + self.grids[self.known[grid]]
