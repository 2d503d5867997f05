import contextlib
import gzip
import hashlib
import io
import os
import shutil
import unicodedata

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import helpers
from rights import in_child, needs_fork, write_protect

LONG = bool(os.environ.get("FAULTS_LONG"))
GREY, COLOR = (1, 28, 28), (3, 32, 32)


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist(data, monkeypatch):
    """A small MNIST, raw files without their archives, whose checksums the helpers know. Returns name → archive."""
    random = np.random.default_rng(0)
    archives, resources = {}, []
    for part, count in (("train", 60), ("t10k", 20)):
        for kind, array in (
            ("images-idx3", random.integers(0, 256, (count, 28, 28))),
            ("labels-idx1", np.arange(count) % 10),
        ):
            name, content = f"{part}-{kind}-ubyte", idx(array)
            monkeypatch.setitem(helpers.MNIST_MD5, name, hashlib.md5(content).hexdigest())
            archives[f"{name}.gz"] = gzip.compress(content)
            resources.append((f"{name}.gz", hashlib.md5(archives[f"{name}.gz"]).hexdigest()))
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    raw = data / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in archives.items():
        (raw / name.removesuffix(".gz")).write_bytes(gzip.decompress(content))
    return archives


def read_as_told():
    """The provenance of MNIST's training part, and what was printed while it was read."""
    torch.set_num_threads(1)  # those of the parent are not there after a fork
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        split = helpers.load("MNIST", train=True, shape=GREY)
    return split.provenance, printed.getvalue()


class TestMnist:
    def test_reads_torchvisions_layout(self, mnist):
        split = helpers.load("MNIST", train=True, shape=GREY)
        assert split.images.shape == (60, 1, 28, 28)
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        assert split.labels.tolist() == [i % 10 for i in range(60)]
        assert split.classes == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
        assert split.provenance == helpers.Provenance("MNIST", "official", True)
        assert len(helpers.load("MNIST", train=False, shape=GREY)) == 20

    @pytest.mark.parametrize(
        "damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:900] + b"\xff" + b[901:], lambda b: b[:8] + b[16:]]
    )
    def test_damaged_file_is_refused_by_name_and_kept(self, mnist, data, damage, fault):
        path = data / "MNIST" / "raw" / "train-images-idx3-ubyte"
        bad = damage(path.read_bytes())
        path.write_bytes(bad)
        with fault("MNIST file altered, of the right length or not") as seen:
            with pytest.raises(helpers.LabError, match="train-images-idx3-ubyte") as caught:
                helpers.load("MNIST", train=True, shape=GREY)
            seen(caught.value)
        assert not isinstance(caught.value, helpers.DataUnavailable)  # it would be replaced by a stand-in
        assert path.read_bytes() == bad

    def test_good_archive_heals_a_damaged_file(self, mnist, data):
        path = data / "MNIST" / "raw" / "train-images-idx3-ubyte"
        good = path.read_bytes()
        path.write_bytes(good[:100])
        path.with_name(f"{path.name}.gz").write_bytes(mnist["train-images-idx3-ubyte.gz"])
        assert helpers.load("MNIST", train=True, shape=GREY).provenance.verified
        assert path.read_bytes() == good

    @needs_fork
    @pytest.mark.parametrize("holding", ["good files", "good archives", "a damaged file", "nothing"])
    def test_a_folder_that_nobody_may_write_serves_what_it_has(
        self, holding, mnist, data, common_folder, fault, monkeypatch
    ):
        raw = data / "MNIST" / "raw"
        for name, content in mnist.items():
            if holding != "good files":
                (raw / name.removesuffix(".gz")).unlink()
            if holding == "good archives":
                (raw / name).write_bytes(content)
            if holding == "a damaged file":
                (raw / name.removesuffix(".gz")).write_bytes(b"?")
        shutil.copytree(data, common_folder / "data")
        write_protect(common_folder)
        monkeypatch.setenv("LAB_DATA", str(common_folder / "data"))
        monkeypatch.setenv("LAB_OFFLINE", "0")
        monkeypatch.setitem(helpers.MIRRORS, "MNIST", "")
        monkeypatch.setitem(helpers.SIZES, "MNIST", (300, 100))
        refused = {"a damaged file": "does not match", "good archives": "Set LAB_DATA to a folder"}.get(holding)
        with fault(f"read-only data folder with {holding}") as seen, contextlib.ExitStack() as stack:
            caught = stack.enter_context(pytest.raises(helpers.LabError, match=refused)) if refused else None
            provenance, printed = in_child(read_as_told, nobody=True)
            seen(printed.strip("!\n") or provenance)
        if refused:
            seen(caught.value)
            assert not isinstance(caught.value, helpers.DataUnavailable)
        elif holding == "nothing":
            assert provenance.source == "stand-in"
            assert "Permission denied" in printed
            assert "By hand" in printed
        else:
            assert provenance == helpers.Provenance("MNIST", "official", True)

    @pytest.mark.parametrize("content", [b"", b"\0\0\x08", b"<html>please log in</html>", idx(np.arange(59) % 10)])
    @pytest.mark.parametrize("kind", ["images-idx3", "labels-idx1"])
    def test_files_without_checksums_that_are_no_mnist_are_refused(self, mnist, data, kind, content):
        (data / "MNIST").rename(data / "FashionMNIST")  # whose raw files were published without checksums
        (data / "FashionMNIST" / "raw" / f"train-{kind}-ubyte").write_bytes(content)
        with pytest.raises(helpers.LabError, match=r"FashionMNIST: the files in .* are damaged"):
            helpers.load("FashionMNIST", train=True, shape=GREY)

    def test_label_out_of_range_is_refused(self, mnist, data, fault):
        (data / "MNIST").rename(data / "FashionMNIST")
        path = data / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte"
        path.write_bytes(path.read_bytes()[:-1] + b"\x0b")
        with fault("label out of range") as seen:
            with pytest.raises(helpers.LabError, match="labels up to 11") as caught:
                helpers.load("FashionMNIST", train=True, shape=GREY)
            seen(caught.value)

    def test_fashion_without_its_archive_is_read_but_not_verified(self, mnist, data):
        (data / "MNIST").rename(data / "FashionMNIST")
        split = helpers.load("FashionMNIST", train=True, shape=GREY)
        assert split.provenance == helpers.Provenance("FashionMNIST", "official", False)
        assert split.classes[0] == "T-shirt/top"

    def test_missing_data_gives_a_stand_in_that_says_so(self, data, capsys, monkeypatch):
        monkeypatch.setitem(helpers.SIZES, "MNIST", (300, 100))
        split = helpers.load("MNIST", train=True, shape=GREY)
        assert split.provenance == helpers.Provenance("MNIST", "stand-in", False)
        printed = capsys.readouterr().out
        assert "NOT MNIST" in printed
        assert "train-images-idx3-ubyte.gz" in printed  # what to put there by hand
        assert "LAB_OFFLINE" in printed

    def test_a_photograph_lies_as_the_camera_was_held(self, tmp_path):
        pixels = np.zeros((32, 32, 3), dtype=np.uint8)
        pixels[:4] = 255  # a bright upper edge
        stored, exif = Image.fromarray(np.rot90(pixels).copy()), Image.Exif()  # turned to the left, as a sensor may lie
        exif[0x0112] = 6  # "turn to the right to see it upright"
        stored.save(tmp_path / "photo.png", exif=exif)
        upright = helpers.read_image(tmp_path / "photo.png", COLOR)
        assert upright[:, :4].min() == 255
        assert upright[:, 4:].max() == 0

    def test_a_relative_folder_starts_at_the_module(self, mnist, data, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("LAB_DATA", os.path.relpath(data, helpers.HERE))
        assert helpers.load("MNIST", train=True, shape=GREY).provenance.verified


@pytest.mark.parametrize("cifar", ["CIFAR10", "CIFAR100"], indirect=True)
class TestCifar:
    def test_archive_is_unpacked_and_read(self, cifar, data):
        name, table, archive = cifar
        (data / table.filename).write_bytes(archive)
        split = helpers.load(name, train=True, shape=COLOR)
        assert split.images.shape == ((200 if name == "CIFAR100" else 5 * 16), 3, 32, 32)
        assert split.provenance == helpers.Provenance(name, "official", True)
        assert split.classes[3] == "class 3"
        (data / table.filename).unlink()
        again = helpers.load(name, train=True, shape=COLOR)  # now from the folder
        assert torch.equal(again.images, split.images)
        assert torch.equal(again.labels, split.labels)

    def test_wrong_archive_is_refused_by_name(self, cifar, data):
        name, table, archive = cifar
        (data / table.filename).write_bytes(archive[:-7])
        with pytest.raises(helpers.LabError, match=table.filename):
            helpers.load(name, train=True, shape=COLOR)


@pytest.mark.parametrize(("name", "shape", "page"), [("CIFAR10", GREY, "CIFAR"), ("FashionMNIST", COLOR, "MNIST")])
def test_a_dataset_belongs_to_its_notebook(name, shape, page):
    with pytest.raises(helpers.LabError, match=rf"{name} belongs to {page}\.ipynb"):
        helpers.load(name, train=True, shape=shape)


class TestStandIn:
    @pytest.mark.parametrize(
        ("name", "shape"), [("MNIST", GREY), ("FashionMNIST", GREY), ("CIFAR10", COLOR), ("CIFAR100", COLOR)]
    )
    def test_shapes_classes_and_repeatability(self, name, shape):
        split = helpers.load(name, train=True, shape=shape)
        assert split.images.shape[1:] == shape
        assert split.images.dtype == torch.uint8
        assert split.labels.unique().numel() == len(split.classes) == (100 if name == "CIFAR100" else 10)
        assert torch.equal(split.images, helpers.load(name, train=True, shape=shape).images)
        assert not torch.equal(split.images[:500], helpers.load(name, train=False, shape=shape).images)
        assert "STAND-IN" in str(split)

    def test_is_learnable(self):
        train, test = (helpers.load("CIFAR10", part, COLOR) for part in (True, False))
        centres = torch.stack([train.images[train.labels == k].float().mean(dim=0).flatten() for k in range(10)])
        nearest = torch.cdist(test.images.flatten(1).float(), centres).argmin(dim=1)
        assert (nearest == test.labels).float().mean() > 0.4


@pytest.fixture
def image_folder(tmp_path, monkeypatch):
    """An image folder with two classes, one of a non-ASCII name; returns its path."""
    monkeypatch.setenv("LAB_FAST", "0")
    monkeypatch.setenv("LAB_DATA", str(tmp_path / "data"))
    random = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "狗"):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            for number in range(3):
                pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pets" / part / name / f"{number}.png")
    return tmp_path / "pets"


class TestImageFolder:
    def test_reads_every_image_each_time(self, image_folder):
        split = helpers.load(str(image_folder), train=True, shape=COLOR)
        assert split.images.shape == (6, 3, 32, 32)
        assert split.classes == ("cat", "狗")
        assert split.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert split.provenance == helpers.Provenance("pets", "image-folder", False)
        expected = np.asarray(Image.open(image_folder / "train" / "cat" / "0.png"))
        assert np.array_equal(split.images[0].permute(1, 2, 0).numpy(), expected)
        Image.new("RGB", (32, 32), "red").save(image_folder / "train" / "cat" / "0.png")
        assert helpers.load(str(image_folder), train=True, shape=COLOR).images[0, 0].min() == 255

    def test_other_sizes_and_modes_are_converted(self, image_folder):
        Image.new("RGBA", (50, 40), "blue").save(image_folder / "train" / "cat" / "0.png")
        assert helpers.load(str(image_folder), train=True, shape=COLOR).images.shape == (6, 3, 32, 32)
        assert helpers.load(str(image_folder), train=False, shape=GREY).images.shape == (6, 1, 28, 28)

    def check_refused(self, folder, name, words, fault):
        with fault(name) as seen:
            with pytest.raises(helpers.LabError, match=words) as caught:
                helpers.load(str(folder), train=True, shape=COLOR)
            seen(caught.value)

    @pytest.mark.parametrize("damage", [lambda data: b"no image", lambda data: b"", lambda data: data[:400]])
    def test_one_corrupt_jpeg_among_many_is_named(self, image_folder, damage, fault):
        good = Image.effect_noise((32, 32), 50).convert("RGB")
        for number in range(3_000 if LONG else 30):
            good.save(image_folder / "train" / "狗" / f"图{number}.jpg")
        path = image_folder / "train" / "狗" / "图17.jpg"
        path.write_bytes(damage(path.read_bytes()))
        self.check_refused(image_folder, "corrupt JPEG among thousands, non-ASCII names", r"图17\.jpg", fault)

    def test_an_image_too_large_to_decode_is_named(self, image_folder, fault, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
        self.check_refused(image_folder, "image that is a decompression bomb", r"0\.png.*decompression bomb", fault)

    def test_class_missing_in_one_part_is_named(self, image_folder, fault):
        (image_folder / "test" / "狗").rename(image_folder / "test" / "bird")
        self.check_refused(image_folder, "class missing in one part", "bird, 狗", fault)

    def test_empty_class_is_named(self, image_folder, fault):
        (image_folder / "train" / "empty").mkdir()
        self.check_refused(image_folder, "class without images", "empty", fault)

    def test_empty_folder_is_named(self, image_folder, fault):
        shutil.rmtree(image_folder / "train")
        (image_folder / "train").mkdir()
        self.check_refused(image_folder, "empty folder", "train", fault)

    def test_one_class_is_nothing_to_tell_apart(self, image_folder, fault):
        for part in ("train", "test"):
            shutil.rmtree(image_folder / part / "狗")
        self.check_refused(image_folder, "one class", "1 classes are nothing to tell apart", fault)

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
    @pytest.mark.parametrize("shape", [COLOR, GREY])
    def test_what_is_transparent_is_white(self, mode, shape, tmp_path):
        """Black ink on nothing, as a drawing program saves it."""
        alpha = Image.new("L", (32, 32), 0)
        alpha.paste(255, (8, 8, 24, 24))
        image = Image.merge("LA", (Image.new("L", (32, 32), 0), alpha))
        if mode == "P":
            image = Image.new("P", (32, 32), 1)
            image.putpalette([0, 0, 0, 0, 0, 0])
            image.paste(0, (8, 8, 24, 24))
            image.info["transparency"] = 1
        path = tmp_path / ("x.tif" if mode == "PA" else "x.png")
        (image if mode in ("LA", "P") else image.convert("RGBA")).save(path)
        pixels = helpers.read_image(path, shape)
        assert pixels[:, 0, 0].eq(255).all()
        assert pixels[:, 14, 14].eq(0).all()

    @pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
    def test_sixteen_bits_are_scaled(self, suffix, tmp_path):
        ramp = np.linspace(0, 65_535, 28 * 28).round().astype(np.uint16).reshape(28, 28)
        Image.fromarray(ramp).save(tmp_path / f"x{suffix}")
        pixels = helpers.read_image(tmp_path / f"x{suffix}", GREY)[0].numpy()
        assert np.abs(pixels - ramp / 257).max() <= 1

    @pytest.mark.parametrize("kind", [np.float32, np.int32])
    def test_a_range_that_nobody_knows_is_refused(self, kind, tmp_path):
        Image.fromarray(np.ones((28, 28), kind)).save(tmp_path / "x.tif")
        with pytest.raises(helpers.LabError, match=r"x\.tif.*no known range"):
            helpers.read_image(tmp_path / "x.tif", GREY)

    def test_what_is_hidden_or_seen_already_is_not_read(self, image_folder, capsys):
        train = image_folder / "train"
        image = (train / "cat" / "0.png").read_bytes()
        for name in (".ipynb_checkpoints", "cat/.ipynb_checkpoints", "__MACOSX", "cat/@eaDir"):
            folder = train / name
            folder.mkdir()
            (folder / "0-checkpoint.png").write_bytes(image)
        for name in (".DS_Store", "._0.png", "Thumbs.db"):
            (train / "cat" / name).write_bytes(b"x")
        (train / "cat" / "circle").symlink_to("..")
        (train / "cat" / "more").mkdir()
        (train / "cat" / "more" / "3.JFIF").write_bytes(image)
        (train / "狗" / "notes.txt").write_text("x")
        os.mkfifo(train / "狗" / "pipe.png")
        split = helpers.load(str(image_folder), train=True, shape=COLOR)
        assert (len(split), split.classes) == (7, ("cat", "狗"))
        assert split.labels.tolist() == [0] * 4 + [1] * 3
        assert capsys.readouterr().out == "2 files left out of train/: 狗/notes.txt, 狗/pipe.png\n"

    def test_both_forms_of_a_letter_are_one_class(self, image_folder):
        for part, form in (("train", "NFC"), ("test", "NFD")):
            (image_folder / part / "狗").rename(image_folder / part / unicodedata.normalize(form, "Bébé"))
        assert helpers.load(str(image_folder), train=False, shape=COLOR).classes == ("Bébé", "cat")

    def test_long_names_that_look_alike_are_no_single_class(self, image_folder):
        for part in ("train", "test"):
            for number, old in enumerate(("cat", "狗")):
                name = f"Animalia_Arthropoda_Insecta_{number}_Lepidoptera_Nymphalidae_Danaus"
                (image_folder / part / old).rename(image_folder / part / name)
        with pytest.raises(helpers.LabError, match=r"two folders are both shown as Animalia.*….*Danaus\. Rename one"):
            helpers.load(str(image_folder), train=True, shape=COLOR)

    def test_names_in_another_encoding_are_told_apart(self, image_folder):
        for part in ("train", "test"):
            for old, new in (("cat", "鸟"), ("狗", "狗")):
                os.rename(image_folder / part / old, os.fsencode(image_folder / part) + b"/" + new.encode("gbk"))
        split = helpers.load(str(image_folder), train=True, shape=COLOR)
        assert split.classes == (r"\xb9\xb7", r"\xc4\xf1")
        assert split.labels.bincount().tolist() == [3, 3]

    def test_images_outside_of_the_classes_are_named(self, image_folder, capsys):
        shutil.copy(image_folder / "train" / "cat" / "0.png", image_folder / "train" / "loose.png")
        helpers.load(str(image_folder), train=True, shape=COLOR)
        assert "1 files left out of train/: loose.png" in capsys.readouterr().out

    @needs_fork
    def test_a_folder_that_may_not_be_read_is_not_passed_over(self, common_folder, image_folder):
        copy = common_folder / "pictures"
        shutil.copytree(image_folder, copy)
        closed = copy / "train" / "cat" / "closed"
        closed.mkdir()
        shutil.copy(copy / "train" / "cat" / "0.png", closed)
        closed.chmod(0)
        with pytest.raises(helpers.LabError, match="closed"):
            in_child(lambda: helpers.load(str(copy), train=True, shape=COLOR), nobody=True)

    def test_names_that_are_no_text_or_too_long(self, image_folder, capsys):
        cat = image_folder / "train" / "cat"
        os.rename(os.fsencode(cat / "0.png"), os.fsencode(cat) + "/猫.png".encode("gbk"))
        for part in ("train", "test"):
            (image_folder / part / "狗").rename(image_folder / part / ("n" * 240))
        assert helpers.load(str(image_folder), train=True, shape=COLOR).classes == ("cat", "n" * 19 + "…" + "n" * 20)
        with open(os.fsencode(cat) + "/犬.png".encode("gbk"), "wb") as file:
            file.write(b"no image")
        with pytest.raises(helpers.LabError, match="cannot be read as an image") as caught:
            helpers.load(str(image_folder), train=True, shape=COLOR)
        print(caught.value)  # as a page does

    @pytest.mark.parametrize(("name", "words"), [("gone.png", r"gone\.png"), ("circle.png", r"circle\.png")])
    def test_a_link_that_leads_nowhere_is_named(self, image_folder, name, words):
        (image_folder / "train" / "cat" / name).symlink_to(name if name == "circle.png" else "nowhere.png")
        with pytest.raises(helpers.LabError, match=words):
            helpers.load(str(image_folder), train=True, shape=COLOR)

    def test_the_home_of_nobody(self):
        with pytest.raises(helpers.LabError, match="nosuchuser"):
            helpers.load("~nosuchuser/pets", train=True, shape=COLOR)

    def test_no_such_folder(self):
        with pytest.raises(helpers.LabError, match=r"nowhere.*MNIST"):
            helpers.load("nowhere", train=True, shape=COLOR)


class TestHoldOut:
    def test_parts_are_disjoint_and_complete(self):
        split = helpers.load("MNIST", train=True, shape=GREY)
        train, validation = helpers.hold_out(split, 300, seed=1)
        assert (len(train), len(validation)) == (len(split) - 300, 300)
        together = torch.cat([train.images, validation.images]).flatten(1)
        assert torch.equal(together.sum(dim=1).sort()[0], split.images.flatten(1).sum(dim=1).sort()[0])
        assert torch.equal(helpers.hold_out(split, 300, seed=1)[1].images, validation.images)
        assert not torch.equal(helpers.hold_out(split, 300, seed=2)[1].images, validation.images)

    def test_nothing_held_out(self):
        split = helpers.load("MNIST", train=True, shape=GREY)
        train, validation = helpers.hold_out(split, 0, seed=1)
        assert (len(train), len(validation)) == (len(split), 0)

    @pytest.mark.parametrize("count", [-1, 2000])
    def test_absurd_count_is_refused_by_name(self, count):
        with pytest.raises(helpers.LabError, match="LAB_VALIDATION"):
            helpers.hold_out(helpers.load("MNIST", train=True, shape=GREY), count, seed=1)
