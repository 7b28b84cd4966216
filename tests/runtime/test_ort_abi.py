"""Our declaration of ONNX Runtime's C ABI against the official header, where one is installed (ort_header.py)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.runtime.ort_header import find_header

OURS = Path(__file__).resolve().parents[2] / "runtime" / "ort" / "ort_abi.h"


@pytest.fixture(scope="module")
def official() -> str:
    text = _without_comments(find_header("onnxruntime_c_api.h").read_text())
    # Inside OrtApi a C++ compiler sees deleted copies; they are no members.
    return re.sub(r"#if(def|\s+defined\()?\s*\(?__cplusplus\)?\s*\n\s*OrtApi\(.*?#endif", "", text, flags=re.S)


def _without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", text, flags=re.S))


def _body(text: str, opening: str) -> str:
    """What stands between the braces that `opening` opens."""
    start = text.index(opening) + len(opening)
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    raise AssertionError(opening)


def _members(struct: str) -> list[str]:
    """The names of a struct's members in order, function pointers and ORT's macros included."""
    names = []
    for statement in struct.split(";"):
        statement = " ".join(line for line in statement.splitlines() if not line.lstrip().startswith("#")).strip()
        if not statement:
            continue
        if macro := re.match(r"ORT_API2_STATUS\(\s*(\w+)", statement):
            names.append(macro[1])
        elif typed := re.match(r"ORT_API_T\([\w\s*]+,\s*(\w+)", statement):
            names.append(typed[1])
        elif release := re.match(r"ORT_CLASS_RELEASE2?\(\s*(\w+)", statement):
            names.append("Release" + release[1])
        elif pointer := re.search(r"\(\s*(?:ORT_API_CALL|QC_ORT_CALL)\s*\*\s*(\w+)\s*\)", statement):
            names.append(pointer[1])
        elif plain := re.search(r"(\w+)$", statement):
            names.append(plain[1])
        else:
            raise AssertionError(f"not understood: {statement!r}")
    return names


def _enum(text: str, name: str) -> dict[str, int]:
    values: dict[str, int] = {}
    value = -1
    for entry in _body(text, f"typedef enum {name} {{").split(","):
        if not entry.strip():
            continue
        key, _, given = entry.partition("=")
        given = given.strip()
        value = value + 1 if not given else values[given] if given in values else int(given, 0)
        values[key.strip()] = value
    return values


def _our_entries() -> dict[str, tuple[int, int]]:
    """Name to (index, number of parameters)."""
    text = _without_comments(OURS.read_text()).split("#define QC_ORT(", 1)[1]
    lines = re.findall(r"^  QC_ORT\((\d+), [\w* ]+, (\w+), (.*?)\)$", text, flags=re.M | re.S)
    return {name: (int(index), _count(parameters)) for index, name, parameters in lines}


def _count(parameters: str) -> int:
    """Parameters at the top level: a function pointer's own do not count."""
    while (reduced := re.sub(r"\([^()]*\)", "", parameters)) != parameters:
        parameters = reduced
    return parameters.count(",") + 1


def test_our_table_is_read_whole() -> None:
    entries = _our_entries()
    assert len(entries) == OURS.read_text().count("QC_ORT(") - 2  # but for the macro and the comment on it
    assert entries["CreateStatus"] == (0, 2) and entries["KernelContext_ParallelFor"] == (274, 5)


def test_every_index_names_the_same_function(official: str) -> None:
    table = _members(_body(official, "struct OrtApi {"))
    # What ONNX Runtime itself asserts of the last function of API versions 1 and 17: our parser counts as it does.
    assert table[101] == "ReleaseCustomOpDomain" and table.index("KernelContext_ParallelFor") == 274
    for name, (index, _) in _our_entries().items():
        assert table[index] == name, f"entry {index} is {table[index]}, ours says {name}"


def test_every_function_takes_as_many_parameters(official: str) -> None:
    struct = _body(official, "struct OrtApi {")
    for name, (_, count) in _our_entries().items():
        if name.startswith("Release"):
            continue
        found = re.search(rf"ORT_API2_STATUS\(\s*{name}\s*,(.*?)\);", struct, flags=re.S) or re.search(
            rf"\*\s*{name}\)\((.*?)\)\s*NO_EXCEPTION", struct, flags=re.S
        )
        assert found, name
        parameters = re.sub(r"_\w+_\([^()]*\)", "", found[1])
        assert _count(parameters) == count, (name, parameters)


def test_the_custom_op_struct_has_the_same_order(official: str) -> None:
    theirs = _members(_body(official, "struct OrtCustomOp {"))
    ours = _members(_body(_without_comments(OURS.read_text()), "struct OrtCustomOp {"))
    assert ours == theirs[: len(ours)]
    assert ours[0] == "version" and len(ours) == 26


def test_the_api_base_has_the_same_order(official: str) -> None:
    theirs = _members(_body(official, "struct OrtApiBase {"))
    assert theirs == _members(_body(_without_comments(OURS.read_text()), "struct OrtApiBase {"))


@pytest.mark.parametrize(
    "enum, ours",
    [
        (
            "ONNXTensorElementDataType",
            {
                "ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED": "kUndefined",
                "ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT": "kFloat",
                "ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8": "kUint8",
                "ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64": "kInt64",
                "ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16": "kFloat16",
            },
        ),
        (
            "OrtErrorCode",
            {
                "ORT_FAIL": "kFail",
                "ORT_INVALID_ARGUMENT": "kInvalidArgument",
                "ORT_RUNTIME_EXCEPTION": "kRuntimeException",
                "ORT_NOT_IMPLEMENTED": "kNotImplemented",
                "ORT_INVALID_GRAPH": "kInvalidGraph",
            },
        ),
        (
            "OrtCustomOpInputOutputCharacteristic",
            {"INPUT_OUTPUT_REQUIRED": "kRequired", "INPUT_OUTPUT_OPTIONAL": "kOptional"},
        ),
        ("OrtMemType", {"OrtMemTypeDefault": "kMemoryDefault"}),
        ("OrtOpAttrType", {"ORT_OP_ATTR_INT": "kAttributeInt"}),
    ],
)
def test_enum_values(official: str, enum: str, ours: dict[str, str]) -> None:
    text = _without_comments(OURS.read_text())
    theirs = _enum(official, enum)
    for their_name, our_name in ours.items():
        found = re.search(rf"\b{our_name} = (\d+)", text)
        assert found and int(found[1]) == theirs[their_name], (their_name, our_name)


def test_our_version_is_one_that_this_header_knows(official: str) -> None:
    version = re.search(r"#define ORT_API_VERSION (\d+)", official)
    ours = re.search(r"kApiVersion = (\d+)", OURS.read_text())
    assert version and ours and int(ours[1]) <= int(version[1])
