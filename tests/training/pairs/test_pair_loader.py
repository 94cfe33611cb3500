"""Claims about how training reads pairs: in the order that the seed decides, ahead of time, from memory or disk."""

import time
from functools import partial

import pytest
import torch

from tests.helpers.pair_folders import change_pair, make_maps, write_pairs
from timm_dvt.errors import UserError
from training.loop.order import positions, with_crops
from training.loop.reading_ahead import read_ahead
from training.pairs.folder import pair_file, read_pair
from training.pairs.reader import PairReader, open_pairs


def test_every_epoch_visits_every_pair_once_in_another_order_that_step_and_seed_decide():
    whole = positions(10, 0, 30, seed=3)
    epochs = [whole[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and positions(10, 0, 30, seed=4) != whole
    assert sum((positions(10, first, first + 3, 3) for first in range(0, 30, 3)), []) == whole


def test_pairs_kept_in_memory_are_those_on_disk(tmp_path):
    found = open_pairs(write_pairs(tmp_path))
    kept, read = PairReader(found), PairReader(found, cache_bytes=0)
    for _ in range(2):
        assert torch.equal(kept.read([3, 1, 3]), read.read([3, 1, 3]))
    assert len(kept._kept) == 2 and not read._kept


def test_places_beyond_the_last_pair_are_crops(tmp_path):
    found = open_pairs(write_pairs(tmp_path, count=3, crops=2))
    assert found.crops == 2
    for reader in (PairReader(found, ("raw", "clean", "artifacts")),) * 2:  # from disk, then from memory
        for image in range(3):
            maps = make_maps(image, crops=2)[5]
            place = found.files.index(pair_file(f"{image}.png", f"{image:064x}"))
            raw, clean, artifacts = reader.read([place, place + 3, place + 6])[:, :, 0].unflatten(2, (4, 4))
            assert torch.equal(raw, torch.stack([maps["raw"], *maps["crops.raw"]]).half())
            assert torch.equal(clean, torch.stack([maps["clean"], *maps["crops.clean"]]).half())
            assert torch.equal(artifacts, maps["artifacts"].half().expand(3, -1, -1, -1))  # tied to places in the input


def test_whole_images_come_as_often_as_asked_for_and_crops_equally_often():
    places = positions(10, 0, 6000, seed=1)
    chosen = with_crops(places, 0, 10, 4, 0.25, seed=1)
    assert [view % 10 for view in chosen] == places
    counts = torch.tensor([view // 10 for view in chosen]).bincount(minlength=5) / 6000
    torch.testing.assert_close(counts, torch.tensor([0.25] + 4 * [0.1875]), rtol=0, atol=0.02)
    assert with_crops(places[41:99], 41, 10, 4, 0.25, seed=1) == chosen[41:99]  # wherever one starts
    assert with_crops(places, 0, 10, 4, 0.25, seed=2) != chosen
    assert with_crops(places, 0, 10, 4, 1.0, seed=1) == with_crops(places, 0, 10, 0, 0.25, seed=1) == places


def test_crops_that_are_not_as_many_as_the_settings_say_name_the_file(tmp_path):
    pairs = write_pairs(tmp_path, count=3, crops=2)
    file = open_pairs(pairs).files[1]
    change_pair(pairs / file, **{"crops.clean": torch.zeros(1, 4, 4, 64).half()})
    with pytest.raises(UserError, match=f"{file}: crops must be 2 x 4 x 4 x 64, as settings.json says"):
        open_pairs(pairs)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_batch_stays_as_it_is_until_the_next_is_asked_for(tmp_path, workers):
    reader = PairReader(open_pairs(write_pairs(tmp_path)), cache_bytes=0)
    count = len(reader.pairs.files)
    steps = range(3, 20)

    def places(step):
        return positions(count, 2 * step, 2 * step + 2, seed=1)

    seen = 0
    batches = read_ahead((partial(reader.read, places(step), torch.float32) for step in steps), workers)
    for step, batch in zip(steps, batches, strict=True):
        time.sleep(0.02)
        assert batch.dtype == torch.float32
        assert torch.equal(batch, reader.read(places(step)).float())
        seen += 1
    assert seen == len(steps)


def flipped(data: bytes, place: int) -> bytes:
    """With one other bit."""
    return data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]


def test_one_flipped_bit_of_a_pair_is_noticed_wherever_it_is(tmp_path):
    found = open_pairs(write_pairs(tmp_path, count=1, grid=2, crops=2))
    (file,) = found.files
    path, parts = tmp_path / file, ("raw", "clean", "artifacts")
    whole, places = path.read_bytes(), [0, 1, 2]
    wanted = PairReader(found, parts).read(places)
    noticed = 0
    for place in range(0, len(whole), 41):
        path.write_bytes(flipped(whole, place))
        try:
            assert torch.equal(PairReader(open_pairs(tmp_path), parts).read(places), wanted)  # in what nobody reads
        except UserError as error:
            noticed += 1
            assert str(path) in str(error) and "delete it and make it again" in str(error)
    body = len(whole) - 8 - int.from_bytes(whole[:8], "little")
    assert noticed >= body // 41
    path.write_bytes(whole)
    assert torch.equal(PairReader(open_pairs(tmp_path), parts).read(places), wanted)


def test_a_damaged_map_is_noticed_by_all_that_read_pairs(tmp_path):
    (file,) = open_pairs(write_pairs(tmp_path, count=1)).files
    whole = (tmp_path / file).read_bytes()
    for place in (8, len(whole) - 7):
        (tmp_path / file).write_bytes(flipped(whole, place))
        with pytest.raises(UserError, match=f"{file} cannot be read, it is damaged"):
            read_pair(tmp_path / file)


def test_where_the_system_does_not_say_what_memory_is_free_half_of_all_is_taken_for_it(tmp_path, monkeypatch):
    pages = {"SC_PHYS_PAGES": 4096, "SC_PAGE_SIZE": 4096}

    def of_macos(name):
        if name not in pages:
            raise ValueError("unrecognized configuration name")
        return pages[name]

    monkeypatch.setattr("training.pairs.reader.os.sysconf", of_macos)
    assert PairReader(open_pairs(write_pairs(tmp_path)))._free == 2048 * 4096 // 4
