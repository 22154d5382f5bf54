"""load_image from every kind of source, good and bad; the network tests run against a real server on loopback."""

import base64
import gzip
import http.server
import io
import os
import socketserver
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paddlemix.errors import UserError
from paddlemix.processors.boxes import draw_boxes, parse_boxes
from paddlemix.processors.images import image_digest, load_image

PHOTO = Path(__file__).parents[1] / "fixtures" / "chelsea_small.png"


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks) -> bytes:
    """A PNG by hand, for what PIL doesn't write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))]
    parts += [chunk(*item) for item in chunks]
    parts += [chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def pixel(image: Image.Image, place=(0, 0)):
    assert image.mode == "RGB" and type(image) is Image.Image
    return image.getpixel(place)


def sentence(source, **options) -> str:
    """The one sentence that a bad source raises."""
    with pytest.raises(UserError) as caught:
        load_image(source, **options)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 400
    return text


# ---- sources ----


def test_path_string_bytes_pil_and_array_give_the_same_picture(tmp_path, monkeypatch):
    expected = np.asarray(Image.open(PHOTO).convert("RGB"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my photo: 1.png").write_bytes(PHOTO.read_bytes())
    data_url = "data:image/png;base64," + base64.b64encode(PHOTO.read_bytes()).decode()
    sources = [
        PHOTO, str(PHOTO), PHOTO.read_bytes(), bytearray(PHOTO.read_bytes()), Image.open(PHOTO), expected,
        "~/my photo: 1.png", tmp_path / "my photo: 1.png", data_url,
    ]  # fmt: skip
    digests = set()
    for source in sources:
        image = load_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), expected)
        digests.add(image_digest(image))
    assert len(digests) == 1


def test_digest_depends_on_pixels_and_shape_alone(tmp_path):
    photo = Image.open(PHOTO)
    photo.save(tmp_path / "again.bmp")
    assert image_digest(load_image(tmp_path / "again.bmp")) == image_digest(load_image(PHOTO))
    assert image_digest(photo) == image_digest(load_image(PHOTO))
    other = load_image(PHOTO)
    other.putpixel((3, 3), (1, 2, 3))
    assert image_digest(other) != image_digest(load_image(PHOTO))
    assert image_digest(Image.new("RGB", (2, 8))) != image_digest(Image.new("RGB", (8, 2)))
    # pinned: caches on disk are keyed by it
    assert image_digest(Image.new("RGB", (2, 1), (1, 2, 3))) == (
        "9004b4e151ed81382f5c5f8c9161734ced04beedafc2a6a50c9ae0556eed53c9"
    )


@pytest.mark.parametrize(
    "array, expected",
    [
        (np.full((2, 3), 7, np.uint8), 7),
        (np.full((2, 3, 1), 7, np.uint8), 7),
        (np.full((2, 3, 3), 7, np.int64), 7),
        (np.full((2, 3), 65535, np.uint16), 255),
        (np.full((2, 3), 128 * 257, np.uint16), 128),
        (np.full((2, 3, 3), 0.5, np.float32), 128),
        (np.full((2, 3, 3), 200.4), 200),
        (np.full((2, 3), True), 255),
    ],
)
def test_arrays_of_every_type(array, expected):
    image = load_image(array)
    assert image.size == (3, 2) and pixel(image) == (expected,) * 3


def test_transparent_array_lies_on_white():
    assert pixel(load_image(np.zeros((2, 2, 4), np.uint8))) == (255, 255, 255)


@pytest.mark.parametrize(
    "source, words",
    [
        (np.zeros((3, 20, 20), np.uint8), "shape 3x20x20; expected .* move the channels"),
        (np.zeros((4,), np.uint8), "shape 4;"),
        (np.zeros((0, 4), np.uint8), "empty"),
        (np.full((2, 2, 3), -1.5), "from -1.5 to -1.5"),
        (np.full((2, 2), np.nan), "nan"),
        (np.full((2, 2), 300), "to 300"),
        (np.full((2, 2), "a"), "expected numbers"),
        (np.full((2, 2), 1j), "expected numbers"),
        (None, "NoneType"),
        (3, "int"),
        ("", "empty"),
        (b"", "empty"),
        ("data:image/png", "not a data URL"),
        ("data:image/png;base64,@@@@", "base64"),
        ("data:,hello", "not a picture"),
        ("data:;base64,", "empty"),
        ("ftp://host/a.png", "'ftp'; expected http:// or https://"),
        ("file:///etc/passwd", "'file'"),
        ("FILE:/etc/passwd", "'file'"),
        ("javascript://x", "'javascript'"),
        ("http://", "URL"),
        ("http://[::1", "can't be fetched"),
        ("a\0b.png", "can't be opened"),
        ("x" * 5000, "can't be opened"),
        ("~nobody-of-that-name/a.png", "can't be opened|doesn't exist"),
    ],
)
def test_what_is_no_picture_is_told(source, words):
    with pytest.raises(UserError, match=words):
        load_image(source)
    sentence(source)


# ---- files ----


def test_bad_files(tmp_path):
    assert "doesn't exist" in sentence(tmp_path / "none.png")
    assert "is a folder" in sentence(tmp_path)
    for name, body, words in [
        ("empty.png", b"", "is empty"),
        ("text.png", b"hello, I am no picture", "not a picture that can be read"),
        ("page.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture that can be read"),
        ("cut.png", PHOTO.read_bytes()[:30000], "broken or cut-off"),
        ("cut.jpg", encode(Image.open(PHOTO), "JPEG")[:3000], "broken or cut-off"),
        ("head.png", PHOTO.read_bytes()[:20], "picture"),
        ("flipped.png", PHOTO.read_bytes()[:5000] + b"\0" * 200 + PHOTO.read_bytes()[5200:], "broken"),
        ("page.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n", "not a picture that can be read"),
    ]:
        (tmp_path / name).write_bytes(body)
        text = sentence(tmp_path / name)
        assert words in text and name in text
    assert "broken" in sentence(PHOTO.read_bytes()[:30000])


def test_pipes_and_forbidden_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a regular file" in sentence(tmp_path / "pipe.png")
    (tmp_path / "secret.png").write_bytes(PHOTO.read_bytes())
    (tmp_path / "secret.png").chmod(0)
    if os.geteuid() == 0:  # root reads everything
        assert load_image(tmp_path / "secret.png").mode == "RGB"
    else:
        assert "permission denied" in sentence(tmp_path / "secret.png")


def test_random_damage_is_always_one_sentence_or_a_picture(tmp_path):
    rng = np.random.default_rng(0)
    photo = Image.open(PHOTO).resize((40, 30))
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "ICO", "TGA", "PCX", "PPM"):
        whole = np.frombuffer(encode(photo, kind), np.uint8)
        for _ in range(40):
            hurt = whole.copy()
            hurt[rng.integers(0, len(hurt), rng.integers(1, 20))] = rng.integers(0, 256)
            try:
                assert load_image(hurt[: rng.integers(1, len(hurt) + 1)].tobytes(), max_pixels=10**6).mode == "RGB"
            except UserError as error:
                assert "\n" not in str(error)


def test_decompression_bombs_are_refused_before_they_are_decoded():
    bomb = png(60000, 60000, 1, 0, b"")
    started = time.monotonic()
    text = sentence(bomb)
    assert time.monotonic() - started < 2
    assert "million pixels" in text
    assert "100 x 100 pixels; the largest picture allowed" in sentence(
        encode(Image.new("L", (100, 100))), max_pixels=9999
    )
    assert load_image(encode(Image.new("L", (100, 100))), max_pixels=10000).size == (100, 100)
    assert "allowed" in sentence(Image.new("L", (100, 100)), max_pixels=9999)
    assert "allowed" in sentence(np.zeros((100, 100), np.uint8), max_pixels=9999)


def test_a_large_picture_below_the_limit_makes_no_warning(recwarn):
    with pytest.raises(UserError):
        load_image(png(10000, 10000, 1, 0, b""))  # more than PIL warns about; its data is missing
    assert not [warning for warning in recwarn if "bomb" in str(warning.message)]


# ---- kinds of pictures ----


def test_exif_rotation_is_applied():
    photo = Image.open(PHOTO)
    for orientation, turned in [
        (3, photo.rotate(180)),
        (6, photo.transpose(Image.Transpose.ROTATE_270)),
        (8, photo.transpose(Image.Transpose.ROTATE_90)),
        (2, photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    ]:
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = load_image(encode(photo, exif=exif))
        np.testing.assert_array_equal(np.asarray(image), np.asarray(turned.convert("RGB")))
        # a PIL image that was opened but not turned is turned too
        opened = load_image(Image.open(io.BytesIO(encode(photo, exif=exif))))
        assert image_digest(opened) == image_digest(image)
        for kind in ("PNG", "JPEG", "WEBP", "TIFF"):  # loaded twice, turned once
            once = load_image(encode(photo.convert("RGB"), kind, exif=exif))
            assert once.size == turned.size
            assert image_digest(load_image(once)) == image_digest(once)


def test_a_broken_exif_block_does_not_cost_the_picture():
    image = load_image(encode(Image.open(PHOTO), "JPEG", exif=b"Exif\0\0garbage that is no EXIF"))
    assert image.size == Image.open(PHOTO).size


def test_palette_with_and_without_transparency():
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putdata([0, 1])
    image = load_image(encode(palette))
    assert pixel(image) == (255, 0, 0) and pixel(image, (1, 0)) == (0, 255, 0)
    image = load_image(encode(palette, transparency=0))  # one index
    assert pixel(image) == (255, 255, 255) and pixel(image, (1, 0)) == (0, 255, 0)
    image = load_image(encode(palette, transparency=b"\xff\x80"))  # an alpha for each
    assert pixel(image) == (255, 0, 0) and pixel(image, (1, 0)) == pytest.approx((127, 255, 127), abs=1)
    image = load_image(encode(palette, "GIF", transparency=1))
    assert pixel(image) == (255, 0, 0) and pixel(image, (1, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("LA", (0, 0), (255, 255, 255)),
        ("LA", (90, 255), (90, 90, 90)),
        ("La", (0, 51), (204, 204, 204)),
        ("RGBa", (0, 0, 0, 51), (204, 204, 204)),
        ("PA", (0, 0), (255, 255, 255)),
        ("1", 1, (255, 255, 255)),
        ("1", 0, (0, 0, 0)),
        ("L", 77, (77, 77, 77)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
        ("YCbCr", (128, 128, 128), (128, 128, 128)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 32896, (128, 128, 128)),
        ("I;16", 200, (1, 1, 1)),
        ("I", 65535, (255, 255, 255)),
        ("I", 255, (255, 255, 255)),
        ("F", 1.0, (255, 255, 255)),
        ("F", 0.5, (128, 128, 128)),
        ("F", 100.0, (100, 100, 100)),
    ],
)
def test_every_mode_of_pil(mode, colour, expected):
    image = load_image(Image.new(mode, (3, 2), colour))
    assert image.size == (3, 2) and pixel(image) == expected


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_of_unknown_range_are_stretched(mode):
    image = Image.new(mode, (3, 1))
    image.putdata([-1000, 0, 99000])
    assert [pixel(load_image(image), (x, 0))[0] for x in range(3)] == [0, 3, 255]
    assert pixel(load_image(Image.new(mode, (1, 1), -5)))[0] in (0, 255)  # no range at all: no failure
    holes = Image.fromarray(np.array([[np.nan, np.inf, 0.5]], np.float32))
    assert [pixel(load_image(holes), (x, 0))[0] for x in range(3)] == [0, 255, 128]


def test_sixteen_bit_files_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 256, 1000, 32896, 65535]], np.uint16)
    expected = [0, 1, 4, 128, 255]
    for kind in ("PNG", "TIFF"):
        image = load_image(encode(Image.fromarray(values), kind))
        assert np.asarray(image)[0, :, 1].tolist() == expected
    big_endian = load_image(encode(Image.frombytes("I;16B", (5, 1), values.astype(">u2").tobytes()), "TIFF"))
    assert np.asarray(big_endian)[0, :, 1].tolist() == expected
    turned = Image.Exif()
    turned[0x0112] = 6
    image = load_image(encode(Image.fromarray(values), "PNG", exif=turned))
    assert np.asarray(image)[:, 0, 1].tolist() == expected
    # one grey value of a 16-bit PNG declared transparent
    image = load_image(png(2, 1, 16, 0, b"\0" + b"\x10\x00" + b"\x20\x00", (b"tRNS", b"\x10\x00")))
    assert np.asarray(image)[0, :, 0].tolist() == [255, 32]
    # 16 bits for each of red, green and blue
    image = load_image(png(1, 1, 16, 2, b"\0" + b"\xff\xff\x80\x80\x00\x00"))
    assert pixel(image) == (255, 128, 0)


def test_colour_key_transparency_of_grey_and_rgb_png():
    image = load_image(png(2, 1, 8, 0, b"\0\x10\x20", (b"tRNS", b"\x00\x10")))
    assert np.asarray(image)[0, :, 0].tolist() == [255, 32]
    image = load_image(png(2, 1, 8, 2, b"\0\x01\x02\x03\x04\x05\x06", (b"tRNS", b"\x00\x01\x00\x02\x00\x03")))
    assert pixel(image) == (255, 255, 255) and pixel(image, (1, 0)) == (4, 5, 6)


def test_lab_cmyk_jpeg_and_float_tiff_files():
    image = load_image(encode(Image.new("LAB", (8, 8), (255, 128, 128)), "TIFF"))
    assert pixel(image) == pytest.approx((255, 255, 255), abs=1)
    image = load_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert pixel(image) == pytest.approx((255, 0, 0), abs=4)
    image = load_image(encode(Image.new("F", (8, 8), 0.25), "TIFF"))
    assert pixel(image) == (64, 64, 64)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        moving = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert pixel(load_image(moving)) == (255, 0, 0)


# ---- the network ----


class Handler(http.server.BaseHTTPRequestHandler):
    body = PHOTO.read_bytes()

    def log_message(self, *_):
        pass

    def send(self, body: bytes, status: int = 200, length=None, **headers):
        self.send_response(status)
        if length is not False:
            self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):  # noqa: N802 (the library's name)
        try:
            getattr(self, "get_" + self.path.strip("/").split("/")[0].split("?")[0])()
        except (BrokenPipeError, ConnectionResetError):
            pass

    def get_good(self):
        self.send(self.body)

    def get_nolength(self):
        self.send(self.body, length=False)

    def get_gzip(self):
        self.send(gzip.compress(self.body), Content_Encoding="gzip")

    def get_chunked(self):
        self.protocol_version = "HTTP/1.1"
        self.send(b"", length=False, Transfer_Encoding="chunked")
        for start in range(0, len(self.body), 10000):
            part = self.body[start : start + 10000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")

    def get_missing(self):
        self.send(b"no", 404)

    def get_broken(self):
        self.send(b"no", 500)

    def get_page(self):
        self.send(b"<html>hello</html>", Content_Type="text/html")

    def get_nothing(self):
        self.send(b"")

    def get_cut(self):
        self.send(self.body[:1000], length=len(self.body))

    def get_large(self):
        self.send(b"", length=10**12)

    def get_endless(self):
        self.send(b"", length=False)
        for _ in range(10**6):
            self.wfile.write(b"x" * 2**16)

    def get_lying(self):  # says it is small, compressed; it is not
        self.send(gzip.compress(b"\0" * 10**7), Content_Encoding="gzip")

    def get_silent(self):
        self.server.stop.wait(20)

    def get_drip(self):
        self.send(b"", length=10**6)
        while not self.server.stop.wait(0.05):
            self.wfile.write(b"x")
            self.wfile.flush()

    def get_dripheader(self):
        while not self.server.stop.wait(0.05):
            self.wfile.write(b"H")
            self.wfile.flush()

    def get_moved(self):
        self.send(b"", 302, Location="/hop")

    def get_hop(self):
        self.send(b"", 307, Location=f"http://127.0.0.1:{self.server.server_address[1]}/good")

    def get_loop(self):
        self.send(b"", 302, Location="/loop")

    def get_tofile(self):
        self.send(b"", 302, Location="file:///etc/passwd")

    def get_toftp(self):
        self.send(b"", 301, Location="ftp://127.0.0.1/a.png")

    def get_abrupt(self):
        self.connection.close()


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    server = Server(("127.0.0.1", 0), Handler)
    server.stop = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.stop.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize("path", ["good", "nolength", "gzip", "chunked", "moved", "good/cat.png?size=3"])
def test_a_picture_by_url(server, path):
    assert image_digest(load_image(f"{server}/{path}")) == image_digest(load_image(PHOTO))
    assert load_image(f"{server.upper()}/{path}").mode == "RGB"


@pytest.mark.parametrize(
    "path, words",
    [
        ("missing", "the server answered 404 Not Found"),
        ("broken", "500"),
        ("page", "is not a picture that can be read"),
        ("nothing", "is empty"),
        ("cut", "broke off|connection broke"),
        ("loop", "more than 5 redirects"),
        ("tofile", "redirects to the scheme 'file'"),
        ("toftp", "redirects to the scheme 'ftp'"),
        ("abrupt", "can't be reached or broke off"),
        ("large", "larger than 1 MiB"),
        ("endless", "larger than 1 MiB"),
        ("lying", "larger than 1 MiB"),
    ],
)
def test_a_bad_url_is_told_in_one_sentence(server, path, words):
    with pytest.raises(UserError, match=words):
        load_image(f"{server}/{path}", max_bytes=2**20, timeout=20)
    assert f"{server}/{path}" in sentence(f"{server}/{path}", max_bytes=2**20, timeout=20)


@pytest.mark.parametrize("path", ["silent", "drip", "dripheader"])
def test_a_slow_server_is_left_in_time(server, path):
    started = time.monotonic()
    assert "didn't arrive within 0.6 seconds" in sentence(f"{server}/{path}", timeout=0.6)
    assert time.monotonic() - started < 3


def test_a_server_that_is_not_there():
    with socketserver.TCPServer(("127.0.0.1", 0), None) as closed:
        port = closed.server_address[1]
    assert "refused the connection" in sentence(f"http://127.0.0.1:{port}/a.png")


# ---- boxes in text ----


@pytest.mark.parametrize(
    "text, boxes",
    [
        ("0.23, 0.33, 0.79, 0.78", [(0.23, 0.33, 0.79, 0.78)]),
        ("[0.23, 0.33, 0.79, 0.78]", [(0.23, 0.33, 0.79, 0.78)]),
        ("The cat is at [0.23,0.33,0.79,0.78].", [(0.23, 0.33, 0.79, 0.78)]),
        ("The cat sits at 0.23, 0.33, 0.79, 0.78.", [(0.23, 0.33, 0.79, 0.78)]),
        ("猫在【0.1，0.2，0.3，0.4】", [(0.1, 0.2, 0.3, 0.4)]),
        ("a [0.1, 0.2, 0.3, 0.4] and b [0.5, 0.6, 0.7, 0.8]", [(0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8)]),
        ("a 0.1, 0.2, 0.3, 0.4; b [0.5, 0.6, 0.7, 0.8]", [(0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8)]),
        ("[[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]]", [(0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8)]),
        ("0.1 0.2 0.3 0.4\n0.5 0.6 0.7 0.8", [(0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8)]),
        ("(0.1, 0.2), (0.3, 0.4)", [(0.1, 0.2, 0.3, 0.4)]),
        ("[0, 0, 1, 1]", [(0, 0, 1, 1)]),
        ("[.5, 0.500, 1.0, 1.]", [(0.5, 0.5, 1, 1)]),
        ("There are 3 cats: 0.1, 0.2, 0.3, 0.4", [(0.1, 0.2, 0.3, 0.4)]),
        ("1. 0.1, 0.2, 0.3, 0.4\n2) 0.5, 0.6, 0.7, 0.8", [(0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8)]),
        ("2 0.1, 0.2, 0.3, 0.4", [(0.1, 0.2, 0.3, 0.4)]),
        ("1 0.1, 0.2, 0.3, 0.4 2 0.5,0.6,0.7,0.8", [(0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8)]),
        ("0.1,0.2 0.3,0.4", [(0.1, 0.2, 0.3, 0.4)]),
        ("2 0.1 0.2 0.3 0.4", []),
        ("I count 1, 0, 1, 1", []),
        ("[120, 30, 400, 90]", []),
        ("[0.5, 0.2, 0.3, 0.4]", []),
        ("[0.1, 0.2, 0.3]", []),
        ("0.1, 0.2, 0.3, 0.4, 0.5", []),
        ("-0.1, 0.2, 0.3, 0.4", []),
        ("0.1, 0.2, 0.3, 40%", []),
        ("version 1.2.3.4", []),
        ("", []),
    ],
)
def test_boxes_are_found_in_answers(text, boxes):
    assert parse_boxes(text) == boxes


def test_a_long_answer_is_searched_in_time():
    started = time.monotonic()
    parse_boxes("0." + "1" * 20000 + "x " + "0.1, " * 5000 + "[" * 5000 + "0.1, 0.2, " * 2000)
    assert time.monotonic() - started < 2


def test_boxes_are_drawn_on_a_copy():
    image = Image.new("L", (100, 60))
    drawn = draw_boxes(image, [(10, 10, 40, 30), (50, 0, 100, 60), (5, 5, 5, 5), (90, 50, 80, 40)])
    assert drawn.mode == "RGB" and drawn.size == image.size and image.getbbox() is None
    assert drawn.getpixel((10, 20)) != (0, 0, 0) and drawn.getpixel((40, 20)) == drawn.getpixel((10, 20))
    assert drawn.getpixel((99, 30)) != (0, 0, 0)  # the picture's last column
    assert drawn.getpixel((99, 30)) != drawn.getpixel((10, 20))
    assert drawn.getpixel((25, 20)) == (0, 0, 0)  # nothing is filled
    assert drawn.getpixel((85, 40)) != (0, 0, 0)  # corners in the wrong order
