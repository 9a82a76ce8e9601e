from mlcourse import llm


def test_served_copy_differs_in_its_type_alone():
    from gguf import GGUFReader, dequantize
    four, eight = (GGUFReader(path) for path in (llm.fetch("smollm2-135m-instruct"), llm.served_gguf("smollm2-135m-instruct")))
    def fields(r): return {k: f.contents() for k, f in r.fields.items() if not k.startswith("GGUF.") and k != "general.file_type"}
    assert fields(four) == fields(eight)
    for a, b in zip(four.tensors, eight.tensors, strict=True):
        assert a.name == b.name and (b.tensor_type.name == "Q8_0") == (len(b.shape) == 2)
        if a.name == "blk.3.ffn_down.weight":
            x, y = (dequantize(t.data, t.tensor_type) for t in (a, b))
            assert 0 < abs(x - y).max() < 0.01 * abs(x).max()
