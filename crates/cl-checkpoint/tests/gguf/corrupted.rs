//! Damaged and unsupported files.

use std::fs;

use cl_checkpoint::gguf::{FloatDtype, GgmlType, ImportOptions, import};
use proptest::prelude::*;

use super::writer::{Gguf, Tensor, Value};
use super::{assert_refused, import_bytes};

type Row<'r> = (&'r str, Box<dyn Fn(&mut Gguf)>, Vec<&'r str>);

fn row<'r>(case: &'r str, spoil: impl Fn(&mut Gguf) + 'static, parts: &[&'r str]) -> Row<'r> {
    (case, Box::new(spoil), parts.to_vec())
}

fn text(t: &str) -> Value {
    Value::Text(t.to_owned())
}

fn strings(list: &[&str]) -> Value {
    Value::Strings(list.iter().map(|s| (*s).to_owned()).collect())
}

/// Returns a list with this element type that declares this length.
fn list(kind: u32, count: u64, bytes: &[u8]) -> Value {
    Value::Raw(9, [&kind.to_le_bytes()[..], &count.to_le_bytes(), bytes].concat())
}

fn assert_all_refused(rows: Vec<Row>) {
    let folder = tempfile::tempdir().unwrap();
    import_bytes(folder.path(), &Gguf::tiny().bytes()).expect("what the rows spoil is good");
    fs::remove_dir_all(folder.path().join("out")).unwrap();
    for (case, spoil, parts) in rows {
        let mut file = Gguf::tiny();
        spoil(&mut file);
        assert_refused(case, folder.path(), &file.bytes(), &parts);
    }
}

#[test]
fn a_broken_header_is_refused() {
    assert_all_refused(vec![
        row("magic", |f| f.magic = *b"GGML", &["not a GGUF file"]),
        row("version 1", |f| f.version = 1, &["version 1 is not supported"]),
        row("big endian", |f| f.version = 3u32.swap_bytes(), &["version 50331648", "little-endian"]),
        row("huge count of pairs", |f| f.pair_count = Some(u64::MAX), &["18446744073709551615 keys do not fit"]),
        row("one pair too many", |f| f.pair_count = Some(f.pairs.len() as u64 + 1), &["invalid GGUF header"]),
        row("huge count of tensors", |f| f.tensor_count = Some(u64::MAX), &["18446744073709551615 tensors"]),
        row("a key twice", |f| f.pairs.push(f.pairs[0].clone()), &["`general.architecture` appears twice"]),
        row("a tensor twice", |f| f.tensors.push(f.tensors[0].clone()), &["`token_embd.weight` appears twice"]),
        row("unknown value type", |f| f.set("x.y", Value::Raw(13, vec![])), &["key `x.y`", "value type 13"]),
        row("text beyond the file", |f| f.set("x.y", Value::Raw(8, vec![0xff; 8])), &["key `x.y`", "truncated"]),
        row(
            "text not UTF-8",
            |f| f.set("x.y", Value::Raw(8, [&1u64.to_le_bytes()[..], &[0xff]].concat())),
            &["key `x.y`", "not UTF-8"],
        ),
        row(
            "a list beyond the file",
            |f| f.set("x.y", list(0, u64::MAX, &[])),
            &["key `x.y`", "a list of 18446744073709551615"],
        ),
        row("a list of an unknown type", |f| f.set("x.y", list(99, 1, &[0; 9])), &["key `x.y`", "value type 99"]),
        row(
            "lists in lists without end",
            |f| f.set("x.y", Value::Raw(9, [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat().repeat(1000))),
            &["key `x.y`", "nested too deeply"],
        ),
        row("alignment 0", |f| f.set("general.alignment", Value::U32(0)), &["`general.alignment`", "power of two"]),
        row("alignment 24", |f| f.set("general.alignment", Value::U32(24)), &["`general.alignment`", "power of two"]),
        row("alignment a text", |f| f.set("general.alignment", text("32")), &["`general.alignment`", "power of two"]),
        row("huge alignment", |f| f.set("general.alignment", Value::U64(1 << 63)), &["`general.alignment`"]),
    ]);
}

#[test]
fn a_tensor_that_makes_no_sense_is_refused_by_name() {
    const V: &str = "blk.0.attn_v.weight";
    const NAMED: &str = "`blk.0.attn_v.weight`";
    let v = |spoil: fn(&mut Tensor)| move |f: &mut Gguf| spoil(f.tensor(V));
    assert_all_refused(vec![
        row("overlapping", v(|t| t.offset = Some(0)), &[NAMED, "overlaps tensor", "`token_embd.weight`"]),
        row("beyond the file", v(|t| t.offset = Some(1 << 40)), &[NAMED, "lie outside the file"]),
        row("offset beyond 64 bits", v(|t| t.offset = Some(u64::MAX - 31)), &[NAMED, "lie outside the file"]),
        row("not aligned", v(|t| t.offset = Some(4)), &[NAMED, "not a multiple of the alignment 32"]),
        row("unknown type", v(|t| t.kind = 10), &[NAMED, "type 10 is not supported", "Q4_K"]),
        row("no dimensions", v(|t| t.shape.clear()), &[NAMED, "0 dimensions"]),
        row("five dimensions", v(|t| t.shape = vec![1; 5]), &[NAMED, "5 dimensions"]),
        row("shape beyond 64 bits", v(|t| t.shape = vec![1 << 40, 1 << 40]), &[NAMED, "empty or too large"]),
        row("largest shape", v(|t| t.shape = vec![u64::MAX]), &[NAMED, "empty or too large"]),
        row("no rows", v(|t| t.shape = vec![0, 8]), &[NAMED, "empty or too large"]),
        row("no columns", v(|t| t.shape = vec![4, 0]), &[NAMED, "rows of 0"]),
        row("not whole blocks", v(|t| t.kind = 8), &[NAMED, "rows of 8 elements", "blocks of 32"]),
        row("transposed", v(|t| t.shape.reverse()), &[NAMED, "expected shape [4, 8], got [8, 4]"]),
        row("another rank", v(|t| t.shape = vec![2, 2, 8]), &[NAMED, "expected shape [4, 8], got [2, 2, 8]"]),
        row("missing", |f| f.remove_tensor(V), &[NAMED, "is missing"]),
        row("no embedding", |f| f.remove_tensor("token_embd.weight"), &["`token_embd.weight`", "is missing"]),
        row(
            "a layer that is missing",
            |f| f.set("llama.block_count", Value::U32(2)),
            &["`blk.1.attn_norm.weight`", "is missing"],
        ),
        row(
            "a layer too many",
            |f| f.add("blk.1.attn_q.weight", &[8, 8], (0..).map(|_| 0.0)),
            &["`blk.1.attn_q.weight`", "not part of a llama"],
        ),
        row(
            "left over",
            |f| f.add("blk.0.ffn_gate_inp.weight", &[8], (0..).map(|_| 0.0)),
            &["`blk.0.ffn_gate_inp.weight`", "not part of a llama"],
        ),
        row(
            "one bias of four",
            |f| f.add("blk.0.attn_q.bias", &[8], (0..).map(|_| 0.0)),
            &["`blk.0.attn_k.bias`", "is missing"],
        ),
        row(
            "a bias that is not first",
            |f| f.add("blk.0.attn_k.bias", &[4], (0..).map(|_| 0.0)),
            &["`blk.0.attn_k.bias`", "not part of"],
        ),
        row("NaN", v(|t| t.data[20..24].copy_from_slice(&f32::NAN.to_le_bytes())), &[NAMED, "element 5 is NaN"]),
        row("infinite", v(|t| t.data[..4].copy_from_slice(&f32::INFINITY.to_le_bytes())), &[NAMED, "element 0 is inf"]),
    ]);
}

#[test]
fn metadata_that_cannot_be_used_is_refused_by_key() {
    let set = |key: &'static str, value: Value| move |f: &mut Gguf| f.set(key, value.clone());
    let remove = |key: &'static str| move |f: &mut Gguf| f.remove(key);
    let u = Value::U32;
    let mut rows = vec![
        row("no architecture", remove("general.architecture"), &["`general.architecture` is missing"]),
        row(
            "unknown architecture",
            set("general.architecture", text("mamba")),
            &["`mamba` is not supported", "llama, qwen2, qwen3"],
        ),
        row("architecture a number", set("general.architecture", u(1)), &["`general.architecture`", "expected text"]),
        row("a part of a model", set("split.count", Value::U8(2)), &["`split.count`", "one of 2 parts"]),
        row("an unknown key", set("llama.logit_scale", Value::F32(2.0)), &["`llama.logit_scale`", "not supported"]),
        row("experts", set("llama.expert_count", u(8)), &["`llama.expert_count`", "8 is not supported"]),
        row("not causal", set("llama.attention.causal", Value::Bool(false)), &["`llama.attention.causal`"]),
        row("no layers", set("llama.block_count", u(0)), &["`llama.block_count`", "positive"]),
        row("layers beyond count", set("llama.block_count", Value::U64(u64::MAX)), &["`blk.1.attn_norm.weight`"]),
        row(
            "negative",
            set("llama.embedding_length", Value::I32(-8)),
            &["`llama.embedding_length`", "non-negative integer"],
        ),
        row("a float", set("llama.block_count", Value::F32(1.0)), &["`llama.block_count`", "non-negative integer"]),
        row(
            "heads by layer",
            set("llama.attention.head_count", Value::Ints(vec![2])),
            &["`llama.attention.head_count`"],
        ),
        row(
            "heads that do not divide",
            set("llama.attention.head_count_kv", u(3)),
            &["`llama.attention.head_count_kv`", "3 does not divide 2"],
        ),
        row(
            "more heads than width",
            set("llama.attention.head_count", u(16)),
            &["`llama.attention.head_count`", "not a valid head size"],
        ),
        row(
            "huge head",
            set("llama.attention.key_length", Value::U64(1 << 63)),
            &["`llama.attention.head_count`", "not a valid head size"],
        ),
        row("odd head", set("llama.attention.key_length", u(3)), &["not a valid head size"]),
        row(
            "part of a head rotated",
            set("llama.attention.key_length", u(8)),
            &["`blk.0.attn_q.weight`", "expected shape [16, 8]"],
        ),
        row("other value width", set("llama.attention.value_length", u(2)), &["`llama.attention.value_length`"]),
        row("another vocabulary", set("llama.vocab_size", u(5)), &["`llama.vocab_size`", "4 rows"]),
        row(
            "epsilon 0",
            set("llama.attention.layer_norm_rms_epsilon", Value::F32(0.0)),
            &["`llama.attention.layer_norm_rms_epsilon`"],
        ),
        row(
            "epsilon NaN",
            set("llama.attention.layer_norm_rms_epsilon", Value::F32(f32::NAN)),
            &["`llama.attention.layer_norm_rms_epsilon`", "finite"],
        ),
        row("negative theta", set("llama.rope.freq_base", Value::F32(-1.0)), &["`llama.rope.freq_base`", "positive"]),
        row(
            "unknown scaling",
            set("llama.rope.scaling.type", text("longrope")),
            &["`llama.rope.scaling.type`", "longrope"],
        ),
        row(
            "scaling without factor",
            set("llama.rope.scaling.type", text("yarn")),
            &["`llama.rope.scaling.type`", "factor"],
        ),
        row("shrinking", set("llama.rope.scaling.factor", Value::F32(0.5)), &["`llama.rope.scaling.factor`", "0.5"]),
        row(
            "attention factor",
            set("llama.rope.scaling.attn_factor", Value::F32(2.0)),
            &["`llama.rope.scaling.attn_factor`"],
        ),
        row(
            "rotary part",
            |f| {
                f.set("llama.attention.key_length", Value::U32(4));
                f.set("llama.rope.dimension_count", Value::U32(2));
            },
            &["`llama.rope.dimension_count`", "only 2 of 4"],
        ),
    ];
    for key in [
        "llama.context_length",
        "llama.block_count",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
    ] {
        rows.push(row(key, remove(key), &[key, "is missing"]));
    }
    assert_all_refused(rows);
}

#[test]
fn a_tokenizer_that_cannot_be_made_is_refused_by_key() {
    let set = |key: &str, value: Value| {
        let key = format!("tokenizer.ggml.{key}");
        move |f: &mut Gguf| f.set(&key, value.clone())
    };
    let remove = |key: &str| {
        let key = format!("tokenizer.ggml.{key}");
        move |f: &mut Gguf| f.remove(&key)
    };
    let llama = |key: &'static str, value: Value| {
        move |f: &mut Gguf| {
            f.set("tokenizer.ggml.model", text("llama"));
            f.remove("tokenizer.ggml.merges");
            f.remove("tokenizer.ggml.pre");
            f.set(&format!("tokenizer.ggml.{key}"), value.clone());
        }
    };
    assert_all_refused(vec![
        row(
            "unknown pre",
            set("pre", text("jais-2")),
            &["`tokenizer.ggml.pre` is `jais-2`", "smollm", "llama-bpe", "qwen2"],
        ),
        row("pre in capitals", set("pre", text("SmolLM")), &["`tokenizer.ggml.pre` is `SmolLM`"]),
        row("pre a number", set("pre", Value::U32(1)), &["`tokenizer.ggml.pre`", "expected text"]),
        row("unknown model", set("model", text("t5")), &["`tokenizer.ggml.model` is `t5`", "gpt2, llama"]),
        row("no model", remove("model"), &["`tokenizer.ggml.model` is missing"]),
        row("no tokens", remove("tokens"), &["`tokenizer.ggml.tokens` is missing"]),
        row("an empty vocabulary", set("tokens", strings(&[])), &["`tokenizer.ggml.tokens`", "no tokens"]),
        row(
            "more tokens than rows",
            set("tokens", strings(&["a", "b", "ab", "c", "d"])),
            &["`tokenizer.ggml.tokens`", "only 4 rows"],
        ),
        row(
            "a token twice",
            set("tokens", strings(&["a", "b", "ab", "a"])),
            &["`tokenizer.ggml.tokens`", "tokens 0 and 3"],
        ),
        row(
            "tokens that are numbers",
            set("tokens", Value::Ints(vec![1, 2])),
            &["`tokenizer.ggml.tokens`", "list of texts"],
        ),
        row("tokens that are no list", set("tokens", text("a")), &["`tokenizer.ggml.tokens`", "list of texts"]),
        row("no merges", remove("merges"), &["`tokenizer.ggml.merges` is missing"]),
        row("a merge of one", set("merges", strings(&["ab"])), &["`tokenizer.ggml.merges`", "merge 0"]),
        row("a merge of three", set("merges", strings(&["a b", "a b ab"])), &["`tokenizer.ggml.merges`", "merge 1"]),
        row("a merge of nothing", set("merges", strings(&["a b", " b"])), &["`tokenizer.ggml.merges`", "merge 1"]),
        row("a merge into no token", set("merges", strings(&["b a"])), &["`tokenizer.ggml.merges`", "not a token"]),
        row(
            "types of others",
            set("token_type", Value::Ints(vec![1])),
            &["`tokenizer.ggml.token_type`", "1 types for 4"],
        ),
        row("types that are texts", set("token_type", strings(&["a"])), &["`tokenizer.ggml.token_type`"]),
        row(
            "an id beyond the tokens",
            set("eos_token_id", Value::U32(4)),
            &["`tokenizer.ggml.eos_token_id`", "4 is not among the 4"],
        ),
        row("a negative id", set("bos_token_id", Value::I32(-1)), &["`tokenizer.ggml.bos_token_id`"]),
        row(
            "BOS that is not named",
            set("add_bos_token", Value::Bool(true)),
            &["`tokenizer.ggml.bos_token_id` is missing"],
        ),
        row("no scores", llama("model", text("llama")), &["`tokenizer.ggml.scores` is missing"]),
        row(
            "scores of others",
            llama("scores", Value::Floats(vec![0.0])),
            &["`tokenizer.ggml.scores`", "1 scores for 4"],
        ),
        row(
            "scores NaN",
            llama("scores", Value::Floats(vec![0.0, f32::NAN, 0.0, 0.0])),
            &["`tokenizer.ggml.scores`", "score 1"],
        ),
        row("pre of SentencePiece", llama("pre", text("smollm")), &["`tokenizer.ggml.pre` is `smollm`"]),
    ]);
}

#[test]
fn a_scale_that_is_no_number_is_refused_for_every_quantized_type() {
    let folder = tempfile::tempdir().unwrap();
    for id in [2, 3, 6, 7, 8, 12, 13, 14] {
        let kind = GgmlType::from_id(id).unwrap();
        let (length, size) = (kind.block_len() as u64, kind.block_bytes());
        let mut file = Gguf::tiny();
        file.set("llama.feed_forward_length", Value::U64(length));
        for name in ["gate", "up"] {
            let tensor = file.tensor(&format!("blk.0.ffn_{name}.weight"));
            (tensor.shape, tensor.data) = (vec![length, 8], vec![0; length as usize * 8 * 4]);
        }
        let down = file.tensor("blk.0.ffn_down.weight");
        (down.kind, down.shape, down.data) = (id, vec![8, length], vec![0; 8 * size]);
        import_bytes(folder.path(), &file.bytes()).unwrap();
        fs::remove_dir_all(folder.path().join("out")).unwrap();
        // The scale of the third row.
        let at = 2 * size + if kind == GgmlType::Q6_K { 208 } else { 0 };
        file.tensor("blk.0.ffn_down.weight").data[at..at + 2].copy_from_slice(&[0, 0x7e]);
        let element = format!("element {} is NaN", 2 * length);
        assert_refused(kind.name(), folder.path(), &file.bytes(), &["`blk.0.ffn_down.weight`", &element]);
    }
}

#[test]
fn a_weight_too_large_for_the_dtype_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tiny.gguf");
    let mut gguf = Gguf::tiny();
    gguf.tensor("output_norm.weight").data[4..8].copy_from_slice(&65520f32.to_le_bytes());
    fs::write(&file, gguf.bytes()).unwrap();
    let with = |dtype| import(&file, &folder.path().join("out"), &ImportOptions { dtype, overwrite: true });
    let text = with(FloatDtype::F16).unwrap_err().to_string();
    for part in ["tiny.gguf", "`output_norm.weight`", "element 1 is 65520", "float16", "choose f32"] {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
    assert!(!folder.path().join("out").exists());
    with(FloatDtype::Bf16).unwrap();
    with(FloatDtype::F32).unwrap();
}

#[test]
fn an_output_that_exists_is_kept_and_the_file_itself_never_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("models");
    fs::create_dir(&dir).unwrap();
    let file = dir.join("tiny.gguf");
    fs::write(&file, Gguf::tiny().bytes()).unwrap();
    let with = |out: &str, overwrite| {
        import(&file, &folder.path().join(out), &ImportOptions { overwrite, ..Default::default() })
    };
    for out in ["models", "models/../models"] {
        let text = with(out, true).unwrap_err().to_string();
        assert!(text.contains("models: contains the GGUF file") && text.contains("tiny.gguf"), "{text}");
    }
    with("out", false).unwrap();
    fs::write(folder.path().join("out/notes.txt"), "mine").unwrap();
    let text = with("out", false).unwrap_err().to_string();
    assert!(text.contains("out: already exists"), "{text}");
    assert!(folder.path().join("out/notes.txt").exists());
    let text = with("out", true).unwrap_err().to_string();
    assert!(text.contains("contains `notes.txt`, which was not written by this program"), "{text}");
    fs::remove_file(folder.path().join("out/notes.txt")).unwrap();
    with("out", true).unwrap();
    assert!(file.exists());
}

#[test]
fn a_file_cut_off_anywhere_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let whole = Gguf::tiny().bytes();
    for length in 0..whole.len() {
        assert_refused(&format!("{length} bytes"), folder.path(), &whole[..length], &[]);
    }
    import_bytes(folder.path(), &whole).unwrap();
}

#[test]
fn a_file_cut_off_says_which_key_or_tensor_it_ends_in() {
    let folder = tempfile::tempdir().unwrap();
    let whole = Gguf::tiny().bytes();
    let find = |text: &str| whole.windows(text.len()).position(|w| w == text.as_bytes()).unwrap();
    for key in ["tokenizer.ggml.tokens", "llama.block_count"] {
        let end = find(key) + key.len();
        assert_refused(key, folder.path(), &whole[..end + 6], &[&format!("key `{key}`"), "truncated"]);
    }
    let name = "blk.0.attn_q.weight";
    let end = find(name) + name.len();
    for more in [0, 3, 4, 10, 30] {
        assert_refused(name, folder.path(), &whole[..end + more], &[&format!("tensor `{name}`"), "truncated"]);
    }
}

#[test]
fn a_list_that_would_fill_the_memory_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    let mut file = Gguf::tiny();
    file.pairs.insert(0, ("x.y".to_owned(), list(0, 1 << 40, &[])));
    fs::write(&path, file.bytes()).unwrap();
    // A sparse file: a terabyte of zeros that uses no disk space, but would need 24 times as much memory.
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 41).unwrap();
    let text = import(&path, &folder.path().join("out"), &ImportOptions::default()).unwrap_err().to_string();
    assert!(text.contains("tiny.gguf") && text.contains("key `x.y`: more than"), "{text}");
}

proptest! {
    #[test]
    fn flipped_bytes_never_panic(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5)) {
        let folder = tempfile::tempdir().unwrap();
        let mut bytes = Gguf::tiny().bytes();
        // Flipped bytes of the weights can at most produce NaN, so only the bytes before them are flipped.
        let header = bytes.len() - 1800;
        for (index, byte) in flips {
            bytes[index.index(header)] = byte;
        }
        let imported = import_bytes(folder.path(), &bytes);
        prop_assert_eq!(imported.is_ok(), folder.path().join("out").exists());
    }
}
