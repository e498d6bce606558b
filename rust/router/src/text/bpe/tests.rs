use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::text::fixtures::{LLAMA3_WORDS, QWEN_WORDS, byte_level};

fn demo() -> Value {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../examples/models/demo/tokenizer.json"
    );
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn read(file: &Value) -> (Option<ByteBpe>, Tokenizer) {
    let file = file.to_string().into_bytes();
    let mut reference = Tokenizer::from_bytes(&file).unwrap();
    reference.with_truncation(None).unwrap();
    (ByteBpe::new(&file, &reference), reference)
}

/// The demonstration model's vocabulary and merges with words cut in another way.
fn demo_with(change: impl FnOnce(&mut Value)) -> Value {
    let mut file = demo();
    change(&mut file);
    file
}

fn cut_by(patterns: &[&str]) -> Value {
    let mut steps: Vec<Value> = patterns
        .iter()
        .map(|pattern| {
            json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
        })
        .collect();
    steps.push(json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}));
    json!({"type": "Sequence", "pretokenizers": steps})
}

fn files() -> Vec<(&'static str, Value)> {
    let fixture = |words| serde_json::from_slice(&byte_level(words)).unwrap();
    vec![
        ("demo", demo()),
        ("llama3", fixture(LLAMA3_WORDS)),
        ("qwen", fixture(QWEN_WORDS)),
        (
            "demo, llama3",
            demo_with(|file| file["pre_tokenizer"] = cut_by(&[LLAMA3_WORDS])),
        ),
        (
            "demo, two cuts",
            demo_with(|file| file["pre_tokenizer"] = cut_by(&[r"\p{N}{1,3}", QWEN_WORDS])),
        ),
        (
            "demo, one cut for all",
            demo_with(|file| file["pre_tokenizer"] = cut_by(&[])),
        ),
        (
            "demo, whole words",
            demo_with(|file| file["model"]["ignore_merges"] = json!(true)),
        ),
        (
            "demo, nfc",
            demo_with(|file| file["normalizer"] = json!({"type": "NFC"})),
        ),
    ]
}

/// Text out of what is hard, and out of anything.
fn text() -> impl Strategy<Value = String> {
    let hard = prop::sample::select(vec![
        "<|im_start|>",
        "<|im_end|>",
        "<|im_",
        "<think>",
        "<|end|>",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "hello",
        " world",
        "the ",
        "Ä",
        "中文",
        "😀",
        "e\u{301}",
        "\u{a0}",
        "don't",
        "I'LL",
        "1234567",
        "...",
        "()",
        "_",
        "\u{0}",
    ])
    .prop_map(str::to_owned);
    let part = prop_oneof![3 => hard, 2 => "[a-zA-Z ]{1,12}", 1 => any::<String>()];
    prop::collection::vec(part, 0..20).prop_map(|parts| parts.concat())
}

#[test]
fn no_token_differs_from_the_reference() {
    let files = files().into_iter().map(|(name, file)| (name, read(&file)));
    let tokenisers: Vec<_> = files
        .map(|(name, (bpe, reference))| (name, bpe.expect(name), reference))
        .collect();
    proptest!(ProptestConfig { cases: 200, ..ProptestConfig::default() }, |(text in text())| {
        for (name, bpe, reference) in &tokenisers {
            let expected = reference.encode_fast(&text[..], false).unwrap();
            match bpe.encode(&text) {
                Some(token_ids) => prop_assert_eq!(&token_ids[..], expected.get_ids(), "{}: {:?}", name, text),
                None => prop_assert!(!text.is_ascii() || text.len() > WORD_BYTES_MAX, "{}: {:?}", name, text),
            }
        }
    });
}

/// Merges of three letters in a random order: whatever is merged first decides what can be merged later.
fn merges() -> impl Strategy<Value = Vec<(prop::sample::Index, prop::sample::Index)>> {
    prop::collection::vec(any::<(prop::sample::Index, prop::sample::Index)>(), 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]
    #[test]
    fn merges_happen_in_the_order_of_the_reference(
        picks in merges(), ignores_merges in any::<bool>(), words in prop::collection::vec("[abc]{1,40}", 1..20)
    ) {
        let mut file = demo();
        let mut tokens = vec!["a".to_owned(), "b".to_owned(), "c".to_owned()];
        let vocab = file["model"]["vocab"].as_object_mut().unwrap();
        vocab.retain(|token, _| token.chars().count() == 1 || token.starts_with("<|"));
        let mut merges = Vec::new();
        for (left, right) in picks {
            let pair = (left.get(&tokens).clone(), right.get(&tokens).clone());
            let merged = format!("{}{}", pair.0, pair.1);
            // Two pairs may give one token, and a pair may come twice: the last rank counts.
            if merged.len() <= 20 {
                let id = 5000 + vocab.len();
                vocab.entry(merged.clone()).or_insert_with(|| json!(id));
                merges.push(json!([pair.0, pair.1]));
                tokens.push(merged);
            }
        }
        file["model"]["merges"] = json!(merges);
        file["model"]["ignore_merges"] = json!(ignores_merges);
        let (bpe, reference) = read(&file);
        let bpe = bpe.unwrap();
        for word in words {
            let expected = reference.encode_fast(&word[..], false).unwrap();
            prop_assert_eq!(&bpe.encode(&word).unwrap()[..], expected.get_ids(), "{}", word);
        }
    }
}

#[test]
fn what_is_not_understood_is_left_to_the_reference() {
    let is_read = |change: fn(&mut Value)| read(&demo_with(change)).0.is_some();
    assert!(is_read(|_| ()));
    assert!(!is_read(
        |file| file["normalizer"] = json!({"type": "Lowercase"})
    ));
    assert!(!is_read(|file| file["model"]["dropout"] = json!(0.5)));
    assert!(!is_read(
        |file| file["model"]["end_of_word_suffix"] = json!("</w>")
    ));
    assert!(!is_read(
        |file| file["pre_tokenizer"]["add_prefix_space"] = json!(true)
    ));
    assert!(!is_read(
        |file| file["pre_tokenizer"] = json!({"type": "Whitespace"})
    ));
    assert!(!is_read(
        |file| file["added_tokens"][0]["lstrip"] = json!(true)
    ));
    assert!(!is_read(
        |file| file["added_tokens"][0]["normalized"] = json!(true)
    ));
    assert!(!is_read(|file| {
        file["model"]["vocab"].as_object_mut().unwrap().remove("A");
        let merges = file["model"]["merges"].as_array_mut().unwrap();
        merges.clear();
    }));
}

#[test]
fn a_word_that_is_too_long_is_left_to_the_reference() {
    let (bpe, _) = read(&demo());
    let bpe = bpe.unwrap();
    assert!(bpe.encode(&"a".repeat(WORD_BYTES_MAX)).is_some());
    assert!(bpe.encode(&"a".repeat(WORD_BYTES_MAX + 1)).is_none());
}

#[test]
fn one_that_differs_is_not_used() {
    let file = demo().to_string().into_bytes();
    let reference = Tokenizer::from_bytes(byte_level(QWEN_WORDS)).unwrap();
    assert!(ByteBpe::new(&file, &reference).is_none());
}
