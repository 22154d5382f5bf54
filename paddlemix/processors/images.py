"""Loads a picture from wherever it is: a file, a URL, bytes, PIL or NumPy; what comes out is a PIL image in RGB.

The picture comes out as a person would see it: turned as its EXIF says, transparency on white, 16-bit and float values
scaled (not clipped), the first frame of an animation. Whatever can't be one is a :class:`UserError` of one sentence
that names the source. Nothing is decoded before its size is known to be sane.
"""

import base64
import binascii
import hashlib
import io
import logging
import os
import re
import stat
import threading
import time
import urllib.parse
import warnings
from pathlib import Path
from typing import IO, Any, Dict, List, Optional, Tuple, Union

import numpy as np
from PIL import Image, ImageOps

from paddlemix.errors import UserError

__all__ = ["ImageSource", "image_digest", "image_list", "load_image"]

logger = logging.getLogger("paddlemix.processors.images")

ImageSource = Union[str, "os.PathLike[str]", bytes, Image.Image, np.ndarray]

TIMEOUT = 30.0  # seconds for a whole download, with its redirects
MAX_BYTES = 64 * 2**20  # of a download
MAX_PIXELS = 178_956_970  # where PIL itself refuses: 0.5 GB in RGB
MAX_REDIRECTS = 5
CHUNK = 2**16

# Raster formats that PIL decodes by itself. EPS would run Ghostscript; others are no pictures to look at.
FORMATS = (
    "PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "TGA", "PCX", "SGI",
)  # fmt: skip

# warnings.catch_warnings changes the whole process' filters, and pictures are loaded by several threads
_open_lock = threading.Lock()


def load_image(
    source: ImageSource,
    *,
    timeout: float = TIMEOUT,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """The picture in RGB.

    Args:
        source: a path; an http, https or data URL; the bytes of a file; a PIL image; or an array [H, W] or
            [H, W, 1 | 3 | 4] of bytes, 16-bit numbers, booleans, or floats in 0..1 (or 0..255).
        timeout: seconds that a download may take in all, however slowly its bytes come.
        max_bytes: the largest download.
        max_pixels: width x height of the largest picture; a larger one is refused before it is decoded.

    Raises:
        UserError: there is no such picture, it can't be fetched or read, or it is too large.
    """
    if isinstance(source, Image.Image):
        return _finish(source, "the given picture", max_pixels)
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(source), "the given bytes", max_pixels)
    if not isinstance(source, (str, os.PathLike)):
        raise UserError(
            f"A picture was given as {type(source).__name__}; expected a path, a URL, bytes, a PIL image or an array."
        )
    text = os.fspath(source)
    if not isinstance(text, str):
        text = os.fsdecode(text)
    if isinstance(source, str):
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://|(data|file):", text, re.IGNORECASE)
        if scheme:
            return _from_url(text, (scheme[1] or scheme[2]).lower(), timeout, max_bytes, max_pixels)
    return _from_path(text, max_pixels)


def image_list(images: Any) -> List[Any]:
    """One picture, a list of them, or an array [M, H, W, C] -> a list; nothing is opened."""
    if isinstance(images, (list, tuple)) or (isinstance(images, np.ndarray) and images.ndim == 4):
        return list(images)
    return [images]


def image_digest(image: Image.Image) -> str:
    """A hash of the decoded picture (size and pixels in RGB): the same picture in two files has one digest."""
    image = image if image.mode == "RGB" else load_image(image)
    digest = hashlib.sha256(f"{image.width}x{image.height};".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


# ---- sources ----


def _from_path(text: str, max_pixels: int) -> Image.Image:
    if not text.strip():
        raise UserError("The path of the picture is empty; expected a file or a URL.")
    path = Path(text)
    try:
        if text.startswith("~") and not path.exists():  # which a file's own name may, too
            path = path.expanduser()
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UserError(f"{text} is a folder; expected a picture file.")
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{text} is not a regular file; expected a picture file.")
        if status.st_size == 0:
            raise UserError(f"{text} is empty (0 bytes); expected a picture file.")
        with path.open("rb") as file:
            return _decode(file, text, max_pixels)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{text} doesn't exist; expected a picture file or a URL.") from None
    except PermissionError:
        raise UserError(f"{text} may not be read by this user (permission denied).") from None
    except (OSError, ValueError, RuntimeError) as error:  # a name with a NUL, too long, of an unknown ~user, …
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{shorten(text)} can't be opened: {_reason(reason)}.") from None


def _from_url(url: str, scheme: str, timeout: float, max_bytes: int, max_pixels: int) -> Image.Image:
    name = shorten(url)
    if scheme == "data":
        return _decode(io.BytesIO(_data_url(url, max_bytes)), name, max_pixels)
    if scheme not in ("http", "https"):
        raise UserError(f"{name} has the scheme {scheme!r}; expected http:// or https://, or the path of a file.")
    return _decode(io.BytesIO(_download(url, timeout, max_bytes)), name, max_pixels)


def _data_url(url: str, max_bytes: int) -> bytes:
    name = shorten(url)
    header, comma, body = url.partition(",")
    if not comma:
        raise UserError(f"{name} is not a data URL; expected data:image/png;base64,….")
    if len(body) > 3 * max_bytes:
        raise UserError(f"{name} is larger than {_megabytes(max_bytes)}.")
    body = urllib.parse.unquote_to_bytes(body)
    if header.lower().endswith(";base64"):
        try:
            body = base64.b64decode(b"".join(body.split()), validate=True)
        except binascii.Error as error:
            raise UserError(f"{name} isn't valid base64: {_reason(error)}.") from None
    if len(body) > max_bytes:
        raise UserError(f"{name} is larger than {_megabytes(max_bytes)}.")
    return body


def _from_array(array: np.ndarray, max_pixels: int) -> Image.Image:
    shape = "x".join(map(str, array.shape))
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        hint = "; move the channels to the end" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise UserError(f"A picture came as an array of shape {shape}; expected [H, W] or [H, W, 3 or 4]{hint}.")
    if 0 in array.shape:
        raise UserError(f"A picture came as an empty array of shape {shape}.")
    _check_pixels(array.shape[1], array.shape[0], "the given array", max_pixels)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = _sixteen_to_eight(array)
    elif array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.number) or np.issubdtype(array.dtype, np.complexfloating):
            raise UserError(f"A picture came as an array of {array.dtype}; expected numbers.")
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 255):  # also what is not a number
            raise UserError(
                f"A picture came as an array of {array.dtype} with values from {low:g} to {high:g}; expected 0 to 255, "
                "or 0 to 1 for floats."
            )
        if np.issubdtype(array.dtype, np.floating) and high <= 1:
            array = array * 255.0
        array = np.rint(array).astype(np.uint8)
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)))


# ---- download ----


def _download(url: str, timeout: float, max_bytes: int) -> bytes:
    """The body of an http(s) URL, at most ``max_bytes``, within ``timeout`` seconds in all.

    A socket's timeout starts anew with each byte, and looking up a name has none; so the work is done in a thread
    that is left behind (it ends at its next byte) when the time is over.
    """
    name = shorten(url)
    result: Dict[str, Any] = {}
    deadline = time.monotonic() + timeout

    def work() -> None:
        try:
            result["body"] = _fetch(url, deadline, max_bytes)
        except BaseException as error:  # handed over to the caller's thread
            result["error"] = error

    thread = threading.Thread(target=work, name="paddlemix-download", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive() or isinstance(result.get("error"), TimeoutError):
        raise UserError(f"{name} didn't arrive within {timeout:g} seconds.")
    if "error" in result:
        raise result["error"]
    return result["body"]


def _fetch(url: str, deadline: float, max_bytes: int) -> bytes:
    """One download; TimeoutError when the deadline passes, UserError for what the server answers."""
    import requests  # not needed for files

    name = shorten(url)
    # some servers refuse the library's own name
    headers = {"User-Agent": "Mozilla/5.0 (compatible; paddlemix)", "Accept": "image/*,*/*;q=0.5"}
    with requests.Session() as session:
        try:
            for _ in range(MAX_REDIRECTS + 1):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                with session.get(url, headers=headers, stream=True, allow_redirects=False, timeout=left) as response:
                    if response.is_redirect:
                        url = urllib.parse.urljoin(url, response.headers["location"])
                        scheme = urllib.parse.urlsplit(url).scheme
                        if scheme not in ("http", "https"):
                            raise UserError(f"{name} redirects to the scheme {scheme!r}; expected http or https.")
                        continue
                    if response.status_code != 200:
                        status = f"{response.status_code} {response.reason or ''}".strip()
                        raise UserError(f"{name} can't be fetched: the server answered {status}.")
                    return _body(response, name, deadline, max_bytes)
            raise UserError(f"{name} can't be fetched: more than {MAX_REDIRECTS} redirects.")
        except requests.exceptions.Timeout:
            raise TimeoutError from None
        except (requests.exceptions.RequestException, OSError, ValueError) as error:
            if isinstance(error, (UserError, TimeoutError)):
                raise
            logger.debug("download of %s", name, exc_info=True)
            raise UserError(f"{name} can't be fetched: {_network_reason(error)}.") from None
        except Exception as error:  # urllib3 has its own family of errors
            logger.debug("download of %s", name, exc_info=True)
            if "timed out" in str(error).lower():
                raise TimeoutError from None
            raise UserError(f"{name} can't be fetched: the connection broke ({type(error).__name__}).") from None


def _body(response: Any, name: str, deadline: float, max_bytes: int) -> bytes:
    """What the server sends, counted as it comes: its Content-Length may lie or be missing."""
    too_large = f"{name} is larger than {_megabytes(max_bytes)}, the largest download allowed."
    announced = response.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise UserError(too_large)
    # read1 gives what has come, so that a server that drips is noticed; urllib3 below 2.1 has none
    raw = response.raw
    parts: List[bytes] = []
    received = 0
    while True:
        part = raw.read1(CHUNK, decode_content=True) if hasattr(raw, "read1") else raw.read(1024, decode_content=True)
        if time.monotonic() > deadline:
            raise TimeoutError
        received += len(part)
        if received > max_bytes:
            raise UserError(too_large)
        if not part:
            if announced.isdigit() and not response.headers.get("content-encoding") and received < int(announced):
                raise UserError(f"{name} broke off after {received} of {announced} bytes.")
            return b"".join(parts)
        parts.append(part)


def _network_reason(error: BaseException) -> str:
    """A few words for what requests wraps in three layers."""
    import requests

    text = str(error)
    if isinstance(error, requests.exceptions.SSLError):
        return "its certificate or encryption isn't valid"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy refused"
    if isinstance(error, (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema)):
        return "it isn't a valid URL"
    if "refused" in text:
        return "the server refused the connection"
    if "resolve" in text or "getaddrinfo" in text:
        return "the server's name isn't known"
    if isinstance(error, requests.exceptions.ConnectionError):
        return "the server can't be reached or broke off"
    return _reason(error)


# ---- decoding ----


def _decode(file: IO[bytes], name: str, max_pixels: int) -> Image.Image:
    """Bytes of a file -> picture. Any decoder may raise anything at hostile bytes; all of it is one sentence."""
    if not file.read(1):
        raise UserError(f"{name} is empty (0 bytes); expected a picture.")
    file.seek(0)
    Image.init()  # all of PIL's plugins; the second call does nothing
    try:
        with _open_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs and broken tags; what matters is an error below
            image = Image.open(file, formats=tuple(kind for kind in FORMATS if kind in Image.OPEN))
    except Image.UnidentifiedImageError:
        raise UserError(
            f"{name} is not a picture that can be read; expected PNG, JPEG, GIF, WebP, BMP or TIFF."
        ) from None
    except Image.DecompressionBombError:
        raise UserError(_too_many_pixels(name, None, max_pixels)) from None
    except Exception as error:
        raise UserError(f"{name} is a broken picture: {_reason(error)}.") from error
    with image:
        return _finish(image, name, max_pixels)


def _finish(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """An opened picture -> decoded, upright, RGB."""
    _check_pixels(image.width, image.height, name, max_pixels)
    try:
        image.load()
        return _to_rgb(_upright(image), image.format)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(_too_many_pixels(name, None, max_pixels)) from None
    except MemoryError:
        raise UserError(f"{name} ({image.width} x {image.height} pixels) doesn't fit into memory.") from None
    except Exception as error:
        raise UserError(f"{name} is a broken or cut-off picture: {_reason(error)}.") from error


def _upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says; a broken EXIF block doesn't make the picture unreadable."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:
        logger.warning("EXIF of a picture can't be read (%s); it is taken as it lies.", _reason(error))
        return image


def _to_rgb(image: Image.Image, file_format: Optional[str] = None) -> Image.Image:
    """Any mode of PIL -> RGB: wide numbers scaled to bytes, transparency laid on white."""
    transparent = image.info.get("transparency")
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        image = Image.fromarray(_to_bytes(values, image.mode, file_format))
        if isinstance(transparent, int):
            image.paste(255, mask=Image.fromarray((values == transparent).astype(np.uint8) * 255))
        return image.convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or (
        transparent is not None and image.mode in ("1", "L", "P", "RGB")
    ):
        if image.mode == "La":  # PIL goes from premultiplied to RGBA in two steps
            image = image.convert("LA")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode == "LAB":
        from PIL import ImageCms

        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    return image if image.mode == "RGB" and type(image) is Image.Image else image.convert("RGB")


def _sixteen_to_eight(values: np.ndarray) -> np.ndarray:
    """0..65535 -> 0..255, rounded."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _to_bytes(values: np.ndarray, mode: str, file_format: Optional[str]) -> np.ndarray:
    """uint8 of a picture with one wide channel.

    16 bits are scaled by their range. 32-bit integers and floats carry no range: those within 0..1 (floats), 0..255 or
    0..65535 are taken to use that one, others are stretched from their lowest to their highest value.
    """
    if mode.startswith("I;16") or (mode == "I" and file_format == "PNG"):  # older PIL opens 16 bits as I
        return _sixteen_to_eight(np.clip(values, 0, 65535))
    values = values.astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if low >= 0 and high <= 65535:
        low = 0.0
        high = 1.0 if mode == "F" and high <= 1 else 255.0 if high <= 255 else 65535.0
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    return np.rint((values - low) * (255.0 / (high - low or 1.0))).astype(np.uint8)


def _check_pixels(width: int, height: int, name: str, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise UserError(f"{name} is {width} x {height} pixels, so it shows nothing.")
    if width * height > max_pixels:
        raise UserError(_too_many_pixels(name, (width, height), max_pixels))


def _too_many_pixels(name: str, size: Optional[Tuple[int, int]], max_pixels: int) -> str:
    if size is None:  # PIL refused on its own account
        limit = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
        return f"{name} has more than {limit / 1e6:.0f} million pixels, the largest picture allowed; shrink it."
    return (
        f"{name} is {size[0]} x {size[1]} pixels; the largest picture allowed has {max_pixels / 1e6:.0f} million "
        "pixels, so shrink it."
    )


# ---- words ----


def _reason(error: Any) -> str:
    """An error's message as the tail of a sentence."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if text else type(error).__name__


def shorten(name: str, limit: int = 200) -> str:
    """A picture's name as errors have it: of a data URL only the beginning."""
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def _megabytes(count: int) -> str:
    return f"{count / 2**20:g} MiB" if count >= 2**20 else f"{count} bytes"
