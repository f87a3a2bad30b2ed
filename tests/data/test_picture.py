"""Images as the processor's own loader gives them, decoded when they are needed."""

import io
import os
import subprocess
import sys
import warnings

import datasets
import pytest
from PIL import Image
from transformers.image_utils import load_image

from optimum_qvlm.data.loader import LoaderOptions, make_batches, read_dataset
from optimum_qvlm.data.picture import open_image, read_picture
from optimum_qvlm.data.sample import read_sample
from optimum_qvlm.errors import DataError

SIDEWAYS = 6
"""EXIF orientation of a telephone held upright."""

PEAK = """
import resource, sys, warnings
warnings.simplefilter("ignore")
from PIL import Image
from transformers import AutoProcessor
from optimum_qvlm.data.loader import LoaderOptions, make_batches, read_dataset
processor = AutoProcessor.from_pretrained(sys.argv[1])
options = LoaderOptions(num_samples=8, batch_size=8, max_length=512, seed=0)
records = [{"image": Image.open(sys.argv[2]), "question": "q", "answer": "a"} for _ in range(8)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_, samples = read_dataset(records, options, wants_images=True)
batches = make_batches(samples, processor, options)
assert sum(len(batch["input_ids"]) for batch in batches) == 8
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.fixture
def photograph(tmp_path):
    """Four quarters of different shades, stored lying on the side as telephones do."""
    upright = Image.new("RGB", (32, 48))
    for number, place in enumerate([(0, 0), (16, 0), (0, 24), (16, 24)]):
        upright.paste((60 * number, 250 - 60 * number, 90), (*place, place[0] + 16, place[1] + 24))
    exif = Image.Exif()
    exif[0x0112] = SIDEWAYS
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.png", exif=exif)
    return tmp_path / "photo.png", upright


@pytest.mark.parametrize("form", ["path", "pil", "bytes", "column", "column path"])
def test_photographs_stand_upright(photograph, form):
    path, upright = photograph
    source = {
        "path": path,
        "pil": Image.open(path),
        "bytes": path.read_bytes(),
        "column": {"bytes": path.read_bytes(), "path": "photo.png"},
        "column path": {"bytes": None, "path": str(path)},
    }[form]

    actual = open_image(source, "sample")

    assert actual.tobytes() == upright.tobytes() == load_image(str(path)).tobytes()


def test_the_processor_sees_photographs_upright(photograph, processor):
    path, upright = photograph
    options = LoaderOptions(num_samples=2, batch_size=2, max_length=512, seed=0)
    samples = [read_sample({"image": image, "question": "q", "answer": "a"}, "s") for image in (path, upright)]

    (batch,) = make_batches(samples, processor, options)

    assert batch["pixel_values"][0].equal(batch["pixel_values"][1])


def test_opened_images_of_the_user_are_not_decoded(photograph):
    """Sixty decoded photographs would stay in the user's list."""
    image = Image.open(photograph[0])

    read_picture(image, "sample").open()

    assert image.tile


def test_a_drawing_on_an_opened_image_is_kept(photograph):
    image = Image.open(photograph[0])
    image.paste((1, 2, 3), (0, 0, *image.size))

    assert open_image(image, "sample").getpixel((5, 5)) == (1, 2, 3)


def test_frames_are_those_that_the_user_chose(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.tiff", save_all=True, append_images=frames[1:])
    image = Image.open(tmp_path / "two.tiff")
    image.seek(1)

    assert open_image(image, "sample").getpixel((0, 0)) == (0, 0, 255)


def test_a_pipe_is_refused_at_once(tmp_path):
    """Opening it would wait for a writer for ever."""
    os.mkfifo(tmp_path / "pipe.png")

    with pytest.raises(
        DataError, match=r"dataset\[2\]: the image .*pipe\.png cannot be read \(it is no regular file\)"
    ):
        read_sample({"image": tmp_path / "pipe.png", "question": "q"}, "dataset[2]")


def test_a_bomb_is_refused(monkeypatch, tmp_path):
    Image.new("1", (300, 300)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)

    with pytest.raises(DataError, match=r"dataset\[2\]: the image .*large\.png is too large .*MAX_IMAGE_PIXELS"):
        read_sample({"image": str(tmp_path / "large.png"), "question": "q"}, "dataset[2]")


def test_an_address_is_not_downloaded():
    with pytest.raises(DataError, match=r"s: the image https://host/a\.png is an address; download it"):
        open_image("https://host/a.png", "s")


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_image_columns_are_read_decoded_or_not(photograph, decode, nested):
    image, column = str(photograph[0]), datasets.Image(decode=decode)
    name, feature = ("images", datasets.List(column)) if nested else ("image", column)
    features = datasets.Features({name: feature, "question": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({name: [[image] if nested else image], "question": ["q"]}, features=features)
    options = LoaderOptions(num_samples=2, batch_size=2, max_length=512, seed=0)

    _, (sample,) = read_dataset(rows, options, wants_images=True)

    assert [actual.open().tobytes() for actual in sample.images] == [photograph[1].tobytes()]


def test_large_images_make_small_batches(processor, monkeypatch):
    """What does not fit into memory together is decoded, processed and released one after the other."""
    monkeypatch.setattr("optimum_qvlm.data.rendering.PIXELS_AT_ONCE", 1000)
    sizes = [(20, 20), (20, 20), (20, 20), (40, 40), (10, 10)]
    samples = [read_sample({"image": Image.new("RGB", s), "question": "q", "answer": "a"}, "s") for s in sizes]
    options = LoaderOptions(num_samples=8, batch_size=4, max_length=512, seed=0)

    batches = make_batches(samples, processor, options)

    assert [len(batch["input_ids"]) for batch in batches] == [2, 1, 1, 1]


@pytest.mark.slow
def test_eight_images_of_100_megapixels_take_the_memory_of_one(tmp_path, bundled_folder):
    """All together they took 9 GB."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.effect_noise((100, 100), 50).convert("RGB").resize((10_000, 10_000)).save(tmp_path / "large.jpg")

    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(bundled_folder), str(tmp_path / "large.jpg")], capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1600


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "PPM"])
def test_damage_is_always_named(kind):
    """Whatever Pillow raises for it."""
    stored = io.BytesIO()
    Image.effect_noise((24, 24), 60).convert("RGB").save(stored, kind)
    content = stored.getvalue()

    for place in range(0, min(len(content), 120), 2):
        damaged = content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]
        try:
            assert open_image(damaged, "sample").mode == "RGB"
        except DataError as error:
            assert str(error).startswith("sample: the image of ")
