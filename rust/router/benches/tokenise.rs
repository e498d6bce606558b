//! From a chat to its tokens, on the demonstration model: with the pieces of earlier chats remembered, and without.
//! The short chat has some 230 tokens, the long one 2,900.
//!
//! `cargo bench -p orchestra-router --bench tokenise`

#![expect(clippy::unwrap_used, reason = "a bench fails by panicking")]

use std::{hint::black_box, path::Path, time::SystemTime};

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use orchestra_router::text::{
    template::{ChatTemplate, Conversation},
    tokenizer::ModelTokenizer,
};
use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;

fn file(name: &str) -> Vec<u8> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/models/demo");
    std::fs::read(directory.join(name)).unwrap()
}

/// Random words of a small alphabet, some 4.5 bytes each with their space.
fn words(seed: &mut u64, bytes: usize) -> String {
    let mut text = String::with_capacity(bytes + 8);
    while text.len() < bytes {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let len = 2 + (*seed >> 60) as usize % 4;
        let letter = |at: usize| char::from(b'a' + (*seed >> (8 + 5 * at)) as u8 % 26);
        text.extend((0..len).map(letter));
        text.push(' ');
    }
    text
}

fn chat(system: &str, user: &str) -> Vec<Value> {
    vec![
        json!({"role": "system", "content": system}),
        json!({"role": "user", "content": user}),
    ]
}

fn tokenise(c: &mut Criterion) {
    let plain = Tokenizer::from_bytes(file("tokenizer.json")).unwrap();
    let remembering = ModelTokenizer::from_json(&file("tokenizer.json")).unwrap();
    let config: Value = serde_json::from_slice(&file("tokenizer_config.json")).unwrap();
    let template = ChatTemplate::from_files(&config, "").unwrap();
    let render = |messages: &[Value]| {
        let conversation = Conversation {
            messages,
            tools: &[],
            template_kwargs: &Map::new(),
        };
        template
            .render(&conversation, SystemTime::UNIX_EPOCH)
            .unwrap()
    };
    let mut seed = 7;
    let system = words(&mut seed, 250);
    let mut short = || chat(&system, &words(&mut seed, 60));
    c.bench_function("render, repeated system prompt", |b| {
        b.iter_batched(&mut short, |chat| render(&chat), BatchSize::SmallInput);
    });
    let mut rendered = || render(&short());
    c.bench_function("tokenise, repeated system prompt, as it is", |b| {
        let run = |text: String| black_box(plain.encode_fast(text, false).unwrap().len());
        b.iter_batched(&mut rendered, run, BatchSize::SmallInput);
    });
    c.bench_function("tokenise, repeated system prompt, remembered", |b| {
        let run = |text: String| black_box(remembering.encode(&text, false).unwrap().len());
        b.iter_batched(&mut rendered, run, BatchSize::SmallInput);
    });
    let mut seed = 70;
    let mut long = || render(&chat("be brief", &words(&mut seed, 4096)));
    c.bench_function("tokenise, 4 KB of new words, as it is", |b| {
        let run = |text: String| black_box(plain.encode_fast(text, false).unwrap().len());
        b.iter_batched(&mut long, run, BatchSize::SmallInput);
    });
    c.bench_function("tokenise, 4 KB of new words, remembered", |b| {
        let run = |text: String| black_box(remembering.encode(&text, false).unwrap().len());
        b.iter_batched(&mut long, run, BatchSize::SmallInput);
    });
}

criterion_group!(benches, tokenise);
criterion_main!(benches);
