"""Claims about options that are declared as fields of data classes."""

import argparse
from dataclasses import dataclass

import pytest

from timm_dvt.errors import UserError
from timm_dvt.options import Blocks, add_options, block_list, build, check, option


@dataclass(frozen=True)
class Wheel:
    size: int = option(20, "of a wheel", "--wheel-size", dest="wheel_size", least=2)
    paint: str = "black"


@dataclass(frozen=True)
class Bicycle:
    gears: int = option(7, "to choose from", least=1, beside={"--speeds": {"type": int}})
    frame: str = option("steel", "made of", choices=("steel", "wood"))
    lights: bool = option(True, "lamps")
    bags: tuple[str, ...] = option((), "one each", "--bag", nargs="+", action="extend")
    paint: str = "red"
    wheel: Wheel = Wheel()


def parse(*words):
    parser = argparse.ArgumentParser()
    add_options(parser, Bicycle)
    parser.add_argument("--paint", default="blue")
    return build(Bicycle(), parser.parse_args(words))


def test_a_command_line_gives_an_instance_with_the_data_classes_within():
    assert parse() == Bicycle(paint="blue")
    words = "--speeds 3 --frame wood --no-lights --bag a b --bag c --wheel-size 28 --paint green".split()
    wheel = Wheel(28)  # whose paint is no option
    assert parse(*words) == Bicycle(3, "wood", False, ("a", "b", "c"), "green", wheel)


@pytest.mark.parametrize("words", ["--gears 0", "--frame glass", "--gears 1 --speeds 2", "--wheel-size 1", "--gears x"])
def test_what_a_field_does_not_take_is_refused(words, capsys):
    with pytest.raises(SystemExit):
        parse(*words.split())
    assert words.split()[-2] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "blocks"),
    [("3 5", (3, 5)), ("3,5", (3, 5)), ("3, 5", (3, 5)), ("0 -1", (0, -1)), ("0,-1 4", (0, -1, 4)), ("all", "all")],
)
def test_blocks_are_taken_as_words_and_with_commas(words, blocks):
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", nargs="+", type=block_list, action=Blocks)
    assert parser.parse_args(["--blocks", *words.split()]).blocks == blocks
    for wrong in ("last", "3,x", ",", "all 3", "3 all"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--blocks", *wrong.split()])


@pytest.mark.parametrize("given", [{"gears": 0}, {"frame": "glass"}])
def test_the_class_can_refuse_it_too(given):
    check(Bicycle())
    with pytest.raises(UserError, match=next(iter(given))):
        check(Bicycle(**given))
