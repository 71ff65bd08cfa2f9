from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class MetricType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CPU_USAGE: _ClassVar[MetricType]
    MEMORY_USAGE: _ClassVar[MetricType]
    NETWORK_PACKETS: _ClassVar[MetricType]
    EBPF_RAW: _ClassVar[MetricType]
    DISK_USAGE: _ClassVar[MetricType]
    AGENT_TELEMETRY: _ClassVar[MetricType]
    OTHER: _ClassVar[MetricType]

class Compression(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NONE: _ClassVar[Compression]
    ZSTD: _ClassVar[Compression]

class Lane(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LIVE: _ClassVar[Lane]
    BACKLOG: _ClassVar[Lane]

class LossReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LOSS_UNSPECIFIED: _ClassVar[LossReason]
    RING_FULL: _ClassVar[LossReason]
    SPOOL_EVICTED: _ClassVar[LossReason]
    SPOOL_CORRUPT: _ClassVar[LossReason]
    WORKER_CRASH: _ClassVar[LossReason]
    REJECTED: _ClassVar[LossReason]
    EXPIRED: _ClassVar[LossReason]
CPU_USAGE: MetricType
MEMORY_USAGE: MetricType
NETWORK_PACKETS: MetricType
EBPF_RAW: MetricType
DISK_USAGE: MetricType
AGENT_TELEMETRY: MetricType
OTHER: MetricType
NONE: Compression
ZSTD: Compression
LIVE: Lane
BACKLOG: Lane
LOSS_UNSPECIFIED: LossReason
RING_FULL: LossReason
SPOOL_EVICTED: LossReason
SPOOL_CORRUPT: LossReason
WORKER_CRASH: LossReason
REJECTED: LossReason
EXPIRED: LossReason

class Metric(_message.Message):
    __slots__ = ("timestamp", "name", "value", "labels", "type", "payload", "clock_unsynced")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CLOCK_UNSYNCED_FIELD_NUMBER: _ClassVar[int]
    timestamp: int
    name: str
    value: float
    labels: _containers.ScalarMap[str, str]
    type: MetricType
    payload: bytes
    clock_unsynced: bool
    def __init__(self, timestamp: _Optional[int] = ..., name: _Optional[str] = ..., value: _Optional[float] = ..., labels: _Optional[_Mapping[str, str]] = ..., type: _Optional[_Union[MetricType, str]] = ..., payload: _Optional[bytes] = ..., clock_unsynced: _Optional[bool] = ...) -> None: ...

class BatchMetricsRequest(_message.Message):
    __slots__ = ("metrics", "agent_id", "timestamp")
    METRICS_FIELD_NUMBER: _ClassVar[int]
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    metrics: _containers.RepeatedCompositeFieldContainer[Metric]
    agent_id: str
    timestamp: int
    def __init__(self, metrics: _Optional[_Iterable[_Union[Metric, _Mapping]]] = ..., agent_id: _Optional[str] = ..., timestamp: _Optional[int] = ...) -> None: ...

class BatchMetricsResponse(_message.Message):
    __slots__ = ("success", "message", "accepted_count", "rejected_count")
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_COUNT_FIELD_NUMBER: _ClassVar[int]
    REJECTED_COUNT_FIELD_NUMBER: _ClassVar[int]
    success: bool
    message: str
    accepted_count: int
    rejected_count: int
    def __init__(self, success: _Optional[bool] = ..., message: _Optional[str] = ..., accepted_count: _Optional[int] = ..., rejected_count: _Optional[int] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("version", "agent_id", "agent_version", "token", "lane", "compression")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    agent_id: str
    agent_version: str
    token: str
    lane: Lane
    compression: _containers.RepeatedScalarFieldContainer[Compression]
    def __init__(self, version: _Optional[int] = ..., agent_id: _Optional[str] = ..., agent_version: _Optional[str] = ..., token: _Optional[str] = ..., lane: _Optional[_Union[Lane, str]] = ..., compression: _Optional[_Iterable[_Union[Compression, str]]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("version", "receiver_version", "compression", "max_frame_bytes", "max_batch_records")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_RECORDS_FIELD_NUMBER: _ClassVar[int]
    version: int
    receiver_version: str
    compression: Compression
    max_frame_bytes: int
    max_batch_records: int
    def __init__(self, version: _Optional[int] = ..., receiver_version: _Optional[str] = ..., compression: _Optional[_Union[Compression, str]] = ..., max_frame_bytes: _Optional[int] = ..., max_batch_records: _Optional[int] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("metrics", "plugin", "epoch", "first_seq", "count")
    METRICS_FIELD_NUMBER: _ClassVar[int]
    PLUGIN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FIRST_SEQ_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    metrics: _containers.RepeatedCompositeFieldContainer[Metric]
    plugin: str
    epoch: int
    first_seq: int
    count: int
    def __init__(self, metrics: _Optional[_Iterable[_Union[Metric, _Mapping]]] = ..., plugin: _Optional[str] = ..., epoch: _Optional[int] = ..., first_seq: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class Loss(_message.Message):
    __slots__ = ("plugin", "epoch", "first_seq", "count", "reason")
    PLUGIN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FIRST_SEQ_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    plugin: str
    epoch: int
    first_seq: int
    count: int
    reason: LossReason
    def __init__(self, plugin: _Optional[str] = ..., epoch: _Optional[int] = ..., first_seq: _Optional[int] = ..., count: _Optional[int] = ..., reason: _Optional[_Union[LossReason, str]] = ...) -> None: ...

class Batch(_message.Message):
    __slots__ = ("batch_id", "segments", "losses")
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    batch_id: int
    segments: _containers.RepeatedCompositeFieldContainer[Segment]
    losses: _containers.RepeatedCompositeFieldContainer[Loss]
    def __init__(self, batch_id: _Optional[int] = ..., segments: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ..., losses: _Optional[_Iterable[_Union[Loss, _Mapping]]] = ...) -> None: ...

class Rejection(_message.Message):
    __slots__ = ("plugin", "epoch", "first_seq", "count", "message")
    PLUGIN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FIRST_SEQ_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    plugin: str
    epoch: int
    first_seq: int
    count: int
    message: str
    def __init__(self, plugin: _Optional[str] = ..., epoch: _Optional[int] = ..., first_seq: _Optional[int] = ..., count: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("batch_id", "stored", "duplicates", "rejections")
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    DUPLICATES_FIELD_NUMBER: _ClassVar[int]
    REJECTIONS_FIELD_NUMBER: _ClassVar[int]
    batch_id: int
    stored: int
    duplicates: int
    rejections: _containers.RepeatedCompositeFieldContainer[Rejection]
    def __init__(self, batch_id: _Optional[int] = ..., stored: _Optional[int] = ..., duplicates: _Optional[int] = ..., rejections: _Optional[_Iterable[_Union[Rejection, _Mapping]]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("code", "message")
    class Code(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNSPECIFIED: _ClassVar[Refusal.Code]
        UNSUPPORTED_VERSION: _ClassVar[Refusal.Code]
        UNAUTHENTICATED: _ClassVar[Refusal.Code]
        WRONG_IDENTITY: _ClassVar[Refusal.Code]
        MALFORMED: _ClassVar[Refusal.Code]
        TOO_LARGE: _ClassVar[Refusal.Code]
        STORE_UNAVAILABLE: _ClassVar[Refusal.Code]
    UNSPECIFIED: Refusal.Code
    UNSUPPORTED_VERSION: Refusal.Code
    UNAUTHENTICATED: Refusal.Code
    WRONG_IDENTITY: Refusal.Code
    MALFORMED: Refusal.Code
    TOO_LARGE: Refusal.Code
    STORE_UNAVAILABLE: Refusal.Code
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: Refusal.Code
    message: str
    def __init__(self, code: _Optional[_Union[Refusal.Code, str]] = ..., message: _Optional[str] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("hello", "welcome", "batch", "ack", "refusal")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    welcome: Welcome
    batch: Batch
    ack: Ack
    refusal: Refusal
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., batch: _Optional[_Union[Batch, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...
