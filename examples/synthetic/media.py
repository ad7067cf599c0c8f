"""Encoded films, recordings and tables; a file appears under its name only once it is whole."""

import csv
import wave
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.container import OutputContainer
from av.video.stream import VideoStream

from examples.erc.artifacts import replace
from examples.synthetic.face import FRAME_RATE, HEIGHT, WIDTH, Frame


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file.

    Args:
        path: The file.
        columns: The names of the columns.
        rows: The cells, as many as there are columns.
    """

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(columns)
            table.writerows(rows)

    replace(path, write)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file.

    Args:
        path: The file.
        lines: Its lines, without their ends.
    """
    text = "".join(f"{line}\n" for line in lines)
    replace(path, lambda partial: partial.write_text(text, encoding="utf-8", newline="\n"))


def write_wav(path: Path, samples: npt.NDArray[np.float64], sample_rate: int) -> None:
    """Write a recording as 16-bit PCM.

    Args:
        path: The file.
        samples: (n,), within [-1, 1].
        sample_rate: Samples a second.
    """

    def write(partial: Path) -> None:
        with wave.open(str(partial), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(sample_rate)
            file.writeframes(np.round(32767 * samples).astype("<i2").tobytes())

    replace(path, write)


def write_mp4(
    path: Path, frames: Iterable[Frame], channels: npt.NDArray[np.float64], sample_rate: int
) -> None:
    """Write a film with sound: H.264 and AAC.

    Args:
        path: The file.
        frames: (HEIGHT, WIDTH, 3) RGB frames.
        channels: (2, n), within [-1, 1]: left and right.
        sample_rate: Samples a second.
    """

    def write(partial: Path) -> None:
        with av.open(str(partial), "w", format="mp4") as container:
            # One thread: the bytes must not depend on the number of cores.
            video = container.add_stream(
                "libx264", _RATE, options={"crf": "20", "preset": "veryfast", "threads": "1"}
            )
            # The default search of this encoder takes four times as long.
            audio = container.add_stream(
                "aac", sample_rate, layout="stereo", options={"aac_coder": "fast"}
            )
            _encode(container, video, frames)
            sound = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(channels, dtype=np.float32), format="fltp", layout="stereo"
            )
            sound.sample_rate = sample_rate
            container.mux(audio.encode(sound))
            container.mux(audio.encode(None))

    replace(path, write)


def write_avi(path: Path, frames: Iterable[Frame]) -> None:
    """Write a silent film: MPEG-4 in AVI.

    Args:
        path: The file.
        frames: (HEIGHT, WIDTH, 3) RGB frames.
    """

    def write(partial: Path) -> None:
        with av.open(str(partial), "w", format="avi") as container:
            # Left to itself, this encoder saves bits until nothing of the face is left.
            video = container.add_stream(
                "mpeg4", _RATE, options={"qmin": "2", "qmax": "4", "threads": "1"}
            )
            _encode(container, video, frames)

    replace(path, write)


_RATE = Fraction(FRAME_RATE)


def _encode(container: OutputContainer, stream: VideoStream, frames: Iterable[Frame]) -> None:
    stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
    for frame in frames:
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    container.mux(stream.encode(None))
