//! Small tokenisers for tests, as a `tokenizer.json` holds them.

use serde_json::{Value, json};

/// How Llama 3 cuts text into words.
pub(crate) const LLAMA3_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// How Qwen 2 and 3 do.
pub(crate) const QWEN_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The beginning-of-text token of [`byte_level`].
pub(crate) const BOS: u32 = 265;
/// The end-of-turn token of [`byte_level`].
pub(crate) const END: u32 = 266;
/// Its vocabulary, with a few ids that nothing spells.
pub(crate) const VOCAB_SIZE: u32 = 275;

/// A byte-level BPE: token `b` is byte `b` for `b < 256`, then a few merged words, then special tokens. Text gets
/// [`BOS`] in front where special tokens are asked for.
pub(crate) fn byte_level(words: &str) -> Vec<u8> {
    let character = |byte: u8| byte_character(byte).to_string();
    let mut vocab: serde_json::Map<String, Value> = (0..=u8::MAX)
        .map(|byte| (character(byte), json!(byte)))
        .collect();
    let merges = [
        "h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o", "r l", "rl d", "Ġwo rld",
    ];
    for (id, merge) in (256..).zip(merges) {
        vocab.insert(merge.replace(' ', ""), json!(id));
    }
    let template = |id| json!({"id": "<|bos|>", "ids": [id], "tokens": ["<|bos|>"]});
    let sequence = json!({"Sequence": {"id": "A", "type_id": 0}});
    let file = json!({
        "version": "1.0",
        // Left behind by whoever trained it; must not cut prompts.
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": [
            added(BOS, "<|bos|>", true), added(END, "<|end|>", true), added(267, "<think>", false),
        ],
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        ]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, sequence],
            "pair": [sequence, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|bos|>": template(BOS)},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": vocab, "merges": merges,
        },
    });
    file.to_string().into_bytes()
}

fn added(id: u32, content: &str, special: bool) -> Value {
    json!({
        "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": special,
    })
}

/// GPT-2's spelling of a byte.
fn byte_character(byte: u8) -> char {
    let is_printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if is_printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&lower| !is_printable(lower)).count();
    char::from_u32(0x100 + rank as u32).unwrap()
}
