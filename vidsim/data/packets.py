"""Encoded video packets: their time stamps, decoding them, cutting them without re-encoding.

Frames are known by the time stamps of their packets, read before anything is decoded: so variable
rates, edit lists and reordered frames come out right, and a file that breaks off is noticed.
PyAV (FFmpeg) with one thread.
"""

import bisect
import collections
import contextlib
import dataclasses
import fractions
import functools
import io
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import av
import numpy as np

Source = str | os.PathLike | bytes

_TEXT_ART_CODECS = ("ansi", "bintext", "xbin", "idf")
# Matroska rounds time stamps to milliseconds: closer than this, two instants (in seconds) are one.
SAME_TIME = 1.5e-3
# The packets of smaller files are held, so that nothing is read twice.
_HELD_BYTES = 16_000_000
# What mp4 holds and PyAV's wheels mux; everything else goes to Matroska.
_MP4_CODECS = ("h264", "hevc", "av1", "vp9", "mpeg4")


class DecodeError(Exception):
    """A file that is no video or image, or breaks off; the message is a reason in one line."""


@dataclasses.dataclass(frozen=True)
class Track:
    """A video stream's time stamps. Packets are numbered as stored, frames as shown."""

    pts: Sequence[int]  # of packets, in units of time_base
    dts: Sequence[int]
    durations: Sequence[int]
    keys: Sequence[int]  # the packets that are key frames
    packet_of: Sequence[int]  # the packet of a frame
    start: float  # seconds of the first frame by the file's own clock
    times: np.ndarray  # seconds of frames since the first
    duration: float  # seconds from the first frame to the end of the last
    time_base: fractions.Fraction
    rate: fractions.Fraction | None  # as the container declares it, frames/s
    by_order: bool  # the container holds no usable time stamps

    @property
    def frames(self) -> int:
        return len(self.packet_of)

    @property
    def fps(self) -> float:
        """Mean frames/s: the declared rate where the time stamps agree with it within 1 %."""
        measured = self.frames / self.duration
        if self.rate and abs(measured / float(self.rate) - 1) < 0.01:
            return float(self.rate)
        return measured

    def key_before(self, frame: int) -> int:
        """The last key packet shown no later than `frame`: decoding from there reaches it."""
        if self.by_order:
            return self.keys[0]
        number = bisect.bisect_right(self._key_stamps, self.pts[self.packet_of[frame]])
        return self._latest_keys[number - 1]

    @functools.cached_property
    def _key_stamps(self) -> list[int]:
        return sorted(self.pts[key] for key in self.keys)

    @functools.cached_property
    def _latest_keys(self) -> list[int]:
        """Of the key packets shown no later than each key's time stamp, the last that is stored."""
        by_stamp = sorted(self.keys, key=self.pts.__getitem__)
        return list(itertools.accumulate(by_stamp, max))


@dataclasses.dataclass(frozen=True)
class Film:
    """An open video that was scanned."""

    source: Source = dataclasses.field(repr=False)
    stream: av.VideoStream
    track: Track
    _held: list[av.Packet] | None = dataclasses.field(repr=False)

    @contextlib.contextmanager
    def packets(self, first: int = 0):
        """Yields an iterator over the packets from number `first` on, which `stream` decodes.

        They are held where the file is small; otherwise it is read again, and none is.
        """
        if self._held is not None:
            yield itertools.islice(self._held, first, None)
            return
        with open_video(self.source) as (container, stream):
            yield itertools.islice(video_packets(container, stream), first, None)


@contextlib.contextmanager
def open_video(source: Source):
    """Yields (container, video stream); FFmpeg's failures inside become a DecodeError."""
    with contextlib.ExitStack() as stack:
        # Never by name: FFmpeg reads patterns and protocols into names.
        file = stack.enter_context(open_file(source))
        try:
            container = stack.enter_context(av.open(file))
            cover = av.stream.Disposition.attached_pic
            streams = [s for s in container.streams.video if not s.disposition & cover]
            if not streams:
                raise DecodeError("has no video stream")
            stream = streams[0]
            if stream.codec_context is None:
                raise DecodeError("has a video codec that cannot be decoded here")
            if stream.codec_context.name in _TEXT_ART_CODECS:
                raise DecodeError("is text, not a video")
            stream.thread_type = "SLICE"
            stream.codec_context.thread_count = 1
            yield container, stream
        except (av.FFmpegError, av.codec.codec.UnknownCodecError, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise DecodeError(f"cannot be read as a video: {reason}") from error


def open_file(source: Source):
    """An open binary file. Raises DecodeError for a folder, an empty and an unreadable file."""
    if isinstance(source, bytes | bytearray | memoryview):
        if not len(source):
            raise DecodeError("is empty (0 bytes)")
        return io.BytesIO(source)
    path = pathlib.Path(source)
    if path.is_dir():
        raise DecodeError("is a directory")
    try:
        if not path.stat().st_size:
            raise DecodeError("is empty (0 bytes)")
        return path.open("rb")
    except OSError as error:
        raise DecodeError(f"cannot be opened: {error.strerror}") from error


@contextlib.contextmanager
def open_film(source: Source) -> Iterator[Film]:
    """Opens and scans a video. To open one is to decode its first frames, as FFmpeg does it.

    Raises:
        DecodeError: as `open_video` and `scan`.
    """
    with open_video(source) as (container, stream):
        held = [] if _size(source) <= _HELD_BYTES else None
        yield Film(source, stream, scan(container, stream, held), held)


def _size(source: Source) -> int:
    if isinstance(source, bytes | bytearray | memoryview):
        return len(source)
    return os.stat(source).st_size


def codec_name(stream) -> str:
    """The name of the format, not of the decoder: av1, not libdav1d."""
    return stream.codec_context.codec.canonical_name


def video_packets(container, stream) -> Iterator[av.Packet]:
    return (packet for packet in container.demux(stream) if packet.size)


def scan(container, stream, keep: list | None = None) -> Track:
    """Reads the time stamps of all packets, decoding none; appends the video's packets to `keep`.

    Raises:
        DecodeError: when nothing is there to decode, or less than the container declares.
    """
    pts, dts, durations, keys, shown = [], [], [], [], []
    end = 0.0
    for packet in container.demux():
        if not packet.size:
            continue
        if packet.pts is not None and packet.time_base is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index != stream.index:
            continue
        if packet.is_corrupt:
            raise DecodeError(f"breaks off: packet {len(pts)} is damaged")
        if packet.is_keyframe:
            keys.append(len(pts))
        pts.append(packet.pts)
        dts.append(packet.dts)
        durations.append(packet.duration or 0)
        shown.append(not packet.is_discard)
        if keep is not None:
            keep.append(packet)
    if not keys:
        raise DecodeError("holds no frames" if not pts else "holds no key frame to start from")
    rate, time_base = stream.average_rate or stream.guessed_rate, stream.time_base
    if len(set(pts)) == 1 and pts[0] is not None and (not durations[0] or stream.duration == 0):
        many = f"{len(pts)} frames of one time stamp" if len(pts) > 1 else "one frame"
        raise DecodeError(f"lasts 0 seconds: {many} and no duration")
    # avi stores the order of decoding only.
    by_order = None in pts or len(set(pts)) < len(pts) or container.format.name == "avi"
    if by_order:
        time_base = 1 / fractions.Fraction(rate or 25)
        pts, dts, durations = list(range(len(pts))), list(range(len(pts))), [1] * len(pts)
    elif None in dts:
        delay = max(s - p for s, p in zip(sorted(pts), pts, strict=True))
        dts = [stamp - delay for stamp in sorted(pts)]

    # Frames before the first key frame (a recording cut out of a broadcast) do not decode.
    first = keys[0]
    packet_of = [i for i in range(first, len(pts)) if shown[i] and pts[i] >= pts[first]]
    packet_of.sort(key=pts.__getitem__)
    if not packet_of:
        raise DecodeError("holds no frame that is shown: its edit list shows 0 seconds")
    stamps = [pts[i] - pts[packet_of[0]] for i in packet_of]
    last = durations[packet_of[-1]]
    if not last and len(stamps) > 1:
        last = int(np.median(np.diff(stamps)))
    last = last or max(1, round(1 / ((rate or 25) * time_base)))
    _check_whole(container, stream, len(pts), end, slack=0.02 + float(last * time_base))
    return Track(
        pts=pts,
        dts=dts,
        durations=durations,
        keys=keys,
        packet_of=packet_of,
        start=0.0 if by_order else float(pts[packet_of[0]] * time_base),
        times=np.array([float(stamp * time_base) for stamp in stamps]),
        duration=float((stamps[-1] + last) * time_base),
        time_base=time_base,
        rate=rate,
        by_order=by_order,
    )


def _check_whole(container, stream, packets: int, end: float, *, slack: float) -> None:
    kind, entries = container.format.name, len(stream.index_entries)
    if "mp4" in kind and packets < entries:
        raise DecodeError(f"breaks off: {packets} of {entries} frames are there")
    declared = (container.duration or 0) / av.time_base
    if "matroska" in kind and end < declared - slack:
        raise DecodeError(f"breaks off: {end:.2f} of {declared:.2f} s are there")


def decode(stream, packets: Iterable[av.Packet]) -> Iterator[av.VideoFrame]:
    try:
        for packet in itertools.chain(packets, [None]):
            for frame in stream.codec_context.decode(packet):
                if frame.is_corrupt:
                    raise DecodeError("breaks off: a frame is damaged")
                yield frame
    except av.FFmpegError as error:
        raise DecodeError(f"breaks off: a frame does not decode: {error.strerror}") from error


def numbered(track: Track, frames: Iterable[av.VideoFrame]) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yields (frame number, frame); frames that are not shown are left out."""
    number_of = {track.pts[packet]: number for number, packet in enumerate(track.packet_of)}
    for order, frame in enumerate(frames):
        number = order if track.by_order else number_of.get(frame.pts)
        if number is not None:
            yield number, frame


@dataclasses.dataclass(frozen=True)
class Piece:
    """Part of a video, decodable alone: frames `[first_frame, first_frame + frames)` of `data`."""

    data: bytes
    first_frame: int
    frames: int
    number: int = 0  # among the pieces of its file
    # The data opened, where they are, until the next piece is cut.
    film: Film | None = dataclasses.field(default=None, compare=False, repr=False)


def cut(
    film: Film,
    max_seconds: float,
    *,
    shots: Sequence[int] = (),
    only: Mapping[int, int] | None = None,
    max_lead_seconds: float = 60.0,
) -> Iterator[Piece]:
    """Copies the video packets, without sound, into pieces of at most `max_seconds`.

    With `only`, just the pieces of these numbers, whose first frames, its values, are not looked
    for again. No piece holds frames of two shots; a new one begins at each frame in `shots`.

    Nothing is encoded again. A piece ends at the last key frame in the second half of its time, or
    after `max_seconds` when there is none; then the next one begins with the packets from the key
    frame before it on, and says so by `first_frame`. The file is read in one pass, of which a
    piece's packets are held.

    Raises:
        DecodeError: also when the packets cannot be copied without loss, or when more than
            `max_lead_seconds` would have to be decoded before a piece.
    """
    track = film.track
    if track.by_order:
        raise DecodeError("holds no time stamps to cut by; convert it to mp4")
    parts = list(itertools.pairwise(_edges(track, max_seconds, shots)))
    spans = []
    for a, b in parts:
        begin = track.key_before(a)
        spans.append((begin, max(track.packet_of[a:b]) + 1))
        lead = float((track.pts[track.packet_of[a]] - track.pts[begin]) * track.time_base)
        if lead > max_lead_seconds:
            raise DecodeError(
                f"has no key frame for {lead:.0f} s, which is more than {max_lead_seconds:.0f} s;"
                " encode it with a key frame every few seconds"
            )
    with film.packets() as stored:
        incoming = enumerate(stored)
        window = collections.deque()
        for number, ((begin, end), (a, b)) in enumerate(zip(spans, parts, strict=True)):
            if only is not None and number not in only:
                continue
            while window and window[0][0] < begin:
                window.popleft()
            while not window or window[-1][0] < end - 1:
                item = next(incoming, None)
                if item is None:
                    raise DecodeError("breaks off: it got shorter while it was read")
                if item[0] >= begin:
                    window.append(item)
            data = _remux(film.stream, track, [item for item in window if item[0] < end])
            if only is not None:
                yield Piece(data, only[number], b - a, number)
                continue
            with open_film(data) as copy:
                yield Piece(data, _find(copy.track, track, begin, a, b), b - a, number, copy)


def _edges(track: Track, max_seconds: float, shots: Sequence[int]) -> list[int]:
    """The frames at which pieces begin, and the number of frames."""
    key_packets = set(track.keys)
    keys = [frame for frame, packet in enumerate(track.packet_of) if packet in key_packets]
    times, edges = track.times, []
    for first, stop in itertools.pairwise([0, *shots, track.frames]):
        end = times[stop] if stop < track.frames else track.duration
        edges.append(first)
        while end - times[edges[-1]] > max_seconds * (1 + 1e-6):
            begin = edges[-1]
            limit = times[begin] + max_seconds
            # The first frame that would end beyond the limit, and always one frame of progress.
            latest = max(begin + 1, int(np.searchsorted(times, limit + 1e-6, side="right")) - 1)
            if latest >= stop:
                break
            middle = int(np.searchsorted(times, times[begin] + max_seconds / 2))
            last = bisect.bisect_right(keys, latest) - 1
            good = last >= 0 and keys[last] >= max(begin + 1, middle)
            edges.append(keys[last] if good else latest)
    return [*edges, track.frames]


def _remux(stream, track: Track, numbered_packets: list[tuple[int, av.Packet]]) -> bytes:
    kind = "mp4" if codec_name(stream) in _MP4_CODECS else "matroska"
    file = io.BytesIO()
    # Bit-exact muxing leaves out random ids and versions: the same packets give the same bytes.
    with av.open(file, "w", format=kind, options={"fflags": "+bitexact"}) as output:
        try:
            copy = output.add_stream_from_template(stream, opaque=True)
        except ValueError as error:
            raise DecodeError(f"cannot be copied: {error}; convert it to mp4") from error
        copy.time_base = track.time_base
        zero = track.pts[numbered_packets[0][0]]
        for number, packet in numbered_packets:
            # A packet can belong to two pieces, and muxing rescales it.
            packet.stream = copy
            packet.time_base = track.time_base
            packet.pts, packet.dts = track.pts[number] - zero, track.dts[number] - zero
            packet.duration = track.durations[number]
            output.mux_one(packet)
    return file.getvalue()


def _find(found: Track, track: Track, begin: int, a: int, b: int) -> int:
    """The number of frame `a` in a copy, which starts at packet `begin` and must hold a to b."""
    zero = track.pts[begin] - track.pts[track.packet_of[0]]
    wanted = track.times[a:b] - float(zero * track.time_base)
    # The first frame that is shown need not be the first packet: an edit list may hide some.
    first = int(np.searchsorted(found.times, wanted[0] - SAME_TIME))
    times = found.times[first : first + b - a]
    if len(times) < b - a or np.abs(times - wanted).max() > SAME_TIME:
        raise DecodeError("cannot be copied without loss; convert it to mp4")
    return first
