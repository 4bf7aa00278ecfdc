"""Image files of requests as bytes, for the image processor of the model folder, which decodes them one at a time.

vLLM's own connector decodes the images of all requests at once, and answers 500 to some that cannot be fetched or read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pybase64
import vllm.envs as envs
from PIL import Image
from vllm.exceptions import VLLMClientError, VLLMUnprocessableEntityError
from vllm.multimodal.image import ALLOWED_IMAGE_FORMATS
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.media.base import MediaIO

CONNECTOR = "navil"
OWN_IMAGES = "navil"
"""Key in `media_io_kwargs["image"]` of models whose images this connector reads; vLLM serves others as before."""


class ImageFile(MediaIO[bytes]):
    def load_bytes(self, data: bytes) -> bytes:
        """The file, if its header is that of an image.

        Raises:
            ValueError: no image, a format that vLLM does not read from clients, or too many pixels.
        """
        try:
            with Image.open(BytesIO(data)) as image:
                file_format, (width, height) = image.format, image.size
        except Exception as error:  # Pillow raises errors of many types
            raise ValueError(f"cannot read an image from {len(data)} bytes: {error}") from error
        if file_format not in ALLOWED_IMAGE_FORMATS:
            raise ValueError(f"{file_format} images are not served, only {', '.join(ALLOWED_IMAGE_FORMATS)}")
        if width * height > envs.VLLM_MAX_IMAGE_PIXELS > 0:
            raise ValueError(f"an image has {width} x {height} pixels, more than {envs.VLLM_MAX_IMAGE_PIXELS}")
        return data

    def load_base64(self, media_type: str, data: str) -> bytes:
        return self.load_bytes(pybase64.b64decode(data, validate=True))

    def load_file(self, filepath: Path) -> bytes:
        return self.load_bytes(filepath.read_bytes())


@contextmanager
def client_errors(url: str) -> Iterator[None]:
    """Turns errors that vLLM would answer with 500 into 422: of hosts that fail or are too slow, and of other URLs."""
    try:
        yield
    except (ValueError, VLLMClientError):
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise VLLMUnprocessableEntityError(f"cannot fetch an image from {url[:100]}: {reason}") from error


@MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)
class NaViLMediaConnector(MediaConnector):
    def reads_images(self) -> bool:
        return OWN_IMAGES in self.media_io_kwargs.get("image", {})

    def fetch_image(self, image_url: str, **options: Any) -> Any:
        if not self.reads_images():
            return super().fetch_image(image_url, **options)
        with client_errors(image_url):
            return self.load_from_url(image_url, ImageFile(), fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT)

    async def fetch_image_async(self, image_url: str, **options: Any) -> Any:
        if not self.reads_images():
            return await super().fetch_image_async(image_url, **options)
        with client_errors(image_url):
            return await self.load_from_url_async(image_url, ImageFile(), fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT)
