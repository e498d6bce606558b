//! Request bodies of a given size: a shared beginning and an own end.

use std::io::Write as _;

use super::LoadConfig;
use crate::words::{hash, key};

/// Random text that prompts take their pieces from.
const POOL_BYTES: usize = 1 << 20;
/// What JSON and the message's frame add to a prompt, nearly.
const FRAME_BYTES: usize = 180;

/// Makes bodies; costs a copy each.
pub(super) struct Prompts {
    pool: Vec<u8>,
    prefix_bytes: usize,
    tail_bytes: usize,
    prefixes: u64,
    seed: u64,
    checks: bool,
    /// The body up to the system message's text, and from the user message's end on.
    opening: String,
    ending: String,
}

impl Prompts {
    pub(super) fn new(config: &LoadConfig) -> Self {
        let text = config
            .body_bytes
            .saturating_sub(FRAME_BYTES)
            .clamp(32, POOL_BYTES);
        let prefix_bytes = match config.prefixes {
            0 => 0,
            _ => config.prefix_bytes.unwrap_or(text / 2).min(text),
        };
        let model = serde_json::Value::from(config.model.as_str());
        let (words, streams) = (config.words, config.streams);
        Self {
            pool: pool(config.seed),
            prefix_bytes,
            tail_bytes: text - prefix_bytes,
            prefixes: config.prefixes as u64,
            seed: config.seed,
            checks: config.checks,
            opening: format!(r#"{{"model":{model},"messages":[{{"role":"system","content":""#),
            ending: format!(r#""}}],"max_tokens":{words},"stream":{streams},"seed":"#),
        }
    }

    /// Writes the body of request `number` to `out`; returns the key of its answer where that will be checked.
    pub(super) fn write(&self, number: u64, out: &mut Vec<u8>) -> Option<u64> {
        out.extend_from_slice(self.opening.as_bytes());
        let shared = if self.prefixes == 0 {
            0
        } else {
            number % self.prefixes
        };
        let prefix = self.piece(shared, self.prefix_bytes);
        out.extend_from_slice(prefix);
        out.extend_from_slice(br#""},{"role":"user","content":""#);
        let tail_at = out.len();
        // The number first: no two tails share their beginning.
        let _ = write!(out, "{:016x} ", hash(self.seed, &number.to_le_bytes()));
        let left = self.tail_bytes.saturating_sub(out.len() - tail_at);
        out.extend_from_slice(self.piece(!number, left));
        let tail = tail_at..out.len();
        out.extend_from_slice(self.ending.as_bytes());
        let _ = write!(out, "{number}}}");
        let turns = |tail| {
            [
                b"<|system|>",
                prefix,
                b"\n<|user|>",
                tail,
                b"\n<|assistant|>",
            ]
            .concat()
        };
        self.checks.then(|| key(&turns(&out[tail]), number, 0))
    }

    /// Text that depends on `number` and the seed alone.
    fn piece(&self, number: u64, bytes: usize) -> &[u8] {
        let room = (self.pool.len() - bytes) as u64;
        let at = hash(self.seed, &number.to_le_bytes()) % (room + 1);
        &self.pool[at as usize..][..bytes]
    }
}

/// Words of two to nine letters.
fn pool(seed: u64) -> Vec<u8> {
    let mut state = hash(seed, b"pool");
    let mut pool = Vec::with_capacity(2 * POOL_BYTES);
    while pool.len() < 2 * POOL_BYTES {
        state = hash(state, &[1]);
        let letters = 2 + (state >> 60) as usize % 8;
        pool.extend(
            state
                .to_le_bytes()
                .iter()
                .cycle()
                .take(letters)
                .map(|byte| b'a' + byte % 26),
        );
        pool.push(b' ');
    }
    pool
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn config(body_bytes: usize, prefixes: usize) -> LoadConfig {
        LoadConfig {
            targets: Vec::new(),
            model: "mock".to_owned(),
            streams: true,
            body_bytes,
            prefixes,
            prefix_bytes: None,
            distinct: 0,
            words: 8,
            concurrency: 1,
            count: None,
            duration: Duration::ZERO,
            checks: true,
            seed: 3,
            timeout: Duration::ZERO,
        }
    }

    fn prompts(body_bytes: usize, prefixes: usize) -> Prompts {
        Prompts::new(&config(body_bytes, prefixes))
    }

    fn body(prompts: &Prompts, number: u64) -> (serde_json::Value, usize) {
        let mut out = Vec::new();
        prompts.write(number, &mut out);
        (serde_json::from_slice(&out).unwrap(), out.len())
    }

    #[test]
    fn bodies_are_json_of_about_the_size_asked() {
        for bytes in [512, 4096, 32 << 10] {
            let (parsed, len) = body(&prompts(bytes, 32), 70);
            assert!(len.abs_diff(bytes) < 80, "{len} for {bytes}");
            assert_eq!(parsed["seed"], 70);
        }
    }

    #[test]
    fn a_beginning_has_the_length_asked_and_leaves_the_end_the_rest() {
        let config = LoadConfig {
            prefix_bytes: Some(300),
            ..config(600, 1)
        };
        let (parsed, len) = body(&Prompts::new(&config), 1);
        let bytes = |turn: usize| parsed["messages"][turn]["content"].as_str().unwrap().len();
        assert_eq!((bytes(0), bytes(1)), (300, 600 - FRAME_BYTES - 300));
        assert!(len.abs_diff(600) < 80, "{len}");
    }

    #[test]
    fn beginnings_are_shared_and_ends_are_not() {
        let prompts = prompts(4096, 4);
        let (one, other, third) = (
            body(&prompts, 1).0,
            body(&prompts, 5).0,
            body(&prompts, 2).0,
        );
        assert_eq!(one["messages"][0], other["messages"][0]);
        assert_ne!(one["messages"][0], third["messages"][0]);
        assert_ne!(one["messages"][1], other["messages"][1]);
    }
}
