"""Labels on one side: right where features show what is there, wrong where they show the place alone."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from timm_dvt.errors import UserError
from training.evaluate.run import Run
from training.evaluate.segmentation import one_sided

GRID = 9


class Maps:
    """Stands in for Features: images and their maps as given."""

    def __init__(self, images, maps):
        self._images, self._maps, self.grid = images, maps, GRID
        self.split = type("Split", (), {"name": "some images"})

    def extract(self):
        pass

    def images(self, indices):
        return self._images[indices]

    def batches(self, state, label):
        for i in range(len(self._images)):
            yield [i], self._maps[i : i + 1]


def striped(top=(0.2, 0.4, 0.9), bottom=(0.3, 0.6, 0.1), rows=4):
    """An image of which the upper patches have one color and the lower ones another."""
    image = torch.tensor(bottom).view(3, 1, 1).repeat(1, 8 * GRID, 8 * GRID)
    image[:, : 8 * rows] = torch.tensor(top).view(3, 1, 1)
    return image


def places():
    rows, columns = np.mgrid[:GRID, :GRID]
    return torch.from_numpy(rows), torch.from_numpy(columns)


def content(image):
    """What is there, and nothing of the place: one of two directions."""
    return torch.nn.functional.one_hot(one_sided.color_groups(image, GRID), 2).float()


def place():
    """The column alone, as an angle."""
    _, columns = places()
    return torch.stack([(columns / GRID).cos(), (columns / GRID).sin()], -1).float()


def test_groups_are_the_two_colors():
    groups = one_sided.color_groups(striped(), GRID)
    rows, _ = places()
    assert len(groups.unique()) == 2
    # Colors are means of 3 x 3 patches: the rows beside the edge are mixed, all others are clear.
    for part in (rows < 3, rows > 4):
        assert len(groups[part].unique()) == 1
    assert groups[0, 0] != groups[-1, 0]


@pytest.mark.parametrize("kind, wrong", [("content", 0.0), ("place", 100.0)])
def test_place_alone_gives_the_label_of_its_own_side_and_content_the_right_one(kind, wrong):
    image = striped()
    maps = content(image) if kind == "content" else place()
    numbers = one_sided.run({"val": Maps(image[None], maps[None])}, one_sided.Settings(), Run("raw"))
    assert numbers["wrong"] == wrong and numbers["images"] == 1
    if kind == "content":
        assert numbers["wrong/even"] == 0


def test_labels_are_those_that_scikit_learn_gives():
    torch.manual_seed(0)
    tokens, groups = torch.randn(GRID, GRID, 6), one_sided.color_groups(striped(), GRID)
    rows, columns = places()
    for first in (0, 1):
        labeled = ((columns < 4) & (groups == first)) | ((columns > 4) & (groups != first))
        asked = ((columns < 4) & (groups != first)) | ((columns > 4) & (groups == first))
        bank = KNeighborsClassifier(5, metric="cosine").fit(tokens[labeled].numpy(), groups[labeled].numpy())
        theirs = bank.predict(tokens[asked].numpy()) != groups[asked].numpy()
        assert one_sided.wrong_share(tokens, groups, first) == pytest.approx(theirs.mean())
        found = one_sided.labeled_patches(groups, first)
        assert (found[0] == labeled).all() and (found[1] == asked).all()


def test_a_group_on_one_side_alone_does_not_count():
    image = striped().permute(0, 2, 1)  # left and right
    assert not one_sided.counts(one_sided.color_groups(image, GRID))
    plain = torch.full((3, 72, 72), 0.5)
    assert not one_sided.counts(one_sided.color_groups(plain, GRID))
    maps = torch.zeros(2, GRID, GRID, 2)
    with pytest.raises(UserError, match="no image of some images has two groups of color on both sides, 15%"):
        one_sided.run({"val": Maps(torch.stack([image, plain]), maps)}, one_sided.Settings(), Run("raw"))
