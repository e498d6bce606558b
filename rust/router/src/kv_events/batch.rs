//! A message of vLLM's KV events, decoded.
//!
//! The payload is a batch `[ts, events, data_parallel_rank?]`. Until June 2026 an event was an array, its type first and
//! then the fields by position; since then it is a map with its type under `type`. Fields were appended five times and
//! more will come, so unknown ones are passed over in either form, and so are unknown types of events. A known event
//! that cannot be read makes the batch unreadable: it may have taken away a block that we believe is there.

use std::hash::Hasher;

use orchestra_core::TokenId;
use rustc_hash::FxHasher;

use super::msgpack::{Head, Reader, Unreadable};

/// Most events of a message: an engine sends one for each step.
const EVENTS_MAX: u32 = 1 << 16;

/// An engine's own name for a block: an integer, or a digest folded into one.
pub(super) type EngineHash = u64;

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Event<'a> {
    Stored(Stored<'a>),
    Removed(Removed<'a>),
    Cleared,
    /// Of a type that this version does not know.
    Unknown,
}

/// Blocks of one chain that are held from now on.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Stored<'a> {
    pub(super) hashes: Vec<EngineHash>,
    /// The block before the first one; `None`: the chain begins here.
    pub(super) parent: Option<EngineHash>,
    /// Of all the blocks, one after the other.
    pub(super) token_ids: Vec<TokenId>,
    pub(super) block_size: u64,
    pub(super) lora_id: Option<u64>,
    pub(super) lora_name: Option<&'a str>,
    pub(super) medium: Option<&'a str>,
    /// What a block's identity covers besides tokens, by block; shorter where the last ones have nothing.
    pub(super) extra_keys: Vec<Vec<ExtraKey<'a>>>,
    pub(super) group: u64,
    /// The kind of attention that the group's layers have.
    pub(super) kind: Option<&'a str>,
}

/// Blocks that are held no longer.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Removed<'a> {
    pub(super) hashes: Vec<EngineHash>,
    pub(super) medium: Option<&'a str>,
    pub(super) group: u64,
}

/// One of the things besides tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ExtraKey<'a> {
    /// A salt, an adapter's name or what an image is called.
    Text(&'a str),
    /// Anything else, as it was packed.
    Packed(&'a [u8]),
}

const STORED_FIELDS: [&str; 10] = [
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
    "kv_cache_spec_kind",
];
const REMOVED_FIELDS: [&str; 3] = ["block_hashes", "medium", "group_idx"];

/// The events of a message, in order.
pub(super) fn decode(payload: &[u8]) -> Result<Vec<Event<'_>>, Unreadable> {
    let mut reader = Reader::new(payload);
    let mut events = None;
    match reader.head()? {
        Head::Array(len) if len >= 2 => {
            reader.skip()?;
            events = Some(event_list(&mut reader)?);
        }
        Head::Map(len) => {
            for _ in 0..len {
                if reader.text()? == "events" {
                    events = Some(event_list(&mut reader)?);
                } else {
                    reader.skip()?;
                }
            }
        }
        _ => {}
    }
    events.ok_or(Unreadable)
}

fn event_list<'a>(reader: &mut Reader<'a>) -> Result<Vec<Event<'a>>, Unreadable> {
    let mut ahead = *reader;
    if ahead.array()? > EVENTS_MAX {
        return Err(Unreadable);
    }
    reader.list(event)
}

fn event<'a>(reader: &mut Reader<'a>) -> Result<Event<'a>, Unreadable> {
    let start = *reader;
    let (tag, fields) = match reader.head()? {
        Head::Array(len) => {
            let num_fields = len.checked_sub(1).ok_or(Unreadable)?;
            (reader.text()?, Fields::Listed(num_fields))
        }
        Head::Map(len) => (map_tag(*reader, len)?, Fields::Named(len)),
        _ => return Err(Unreadable),
    };
    match tag {
        "BlockStored" => stored(reader, fields).map(Event::Stored),
        "BlockRemoved" => removed(reader, fields).map(Event::Removed),
        known_or_not => {
            *reader = start;
            reader.skip()?;
            Ok(if known_or_not == "AllBlocksCleared" {
                Event::Cleared
            } else {
                Event::Unknown
            })
        }
    }
}

/// The type of an event that is a map; its place in it is free.
fn map_tag(mut reader: Reader<'_>, len: u32) -> Result<&str, Unreadable> {
    for _ in 0..len {
        if reader.text()? == "type" {
            return reader.text();
        }
        reader.skip()?;
    }
    Err(Unreadable)
}

/// How the fields of an event are written: so many in a known order, or so many pairs.
#[derive(Clone, Copy)]
enum Fields {
    Listed(u32),
    Named(u32),
}

impl Fields {
    /// Shows each field that has a name to `visit`, which reads its value.
    fn each<'a>(
        self,
        names: &[&'static str],
        reader: &mut Reader<'a>,
        mut visit: impl FnMut(&str, &mut Reader<'a>) -> Result<(), Unreadable>,
    ) -> Result<(), Unreadable> {
        match self {
            Self::Listed(len) => {
                for position in 0..len as usize {
                    match names.get(position) {
                        Some(name) => visit(name, reader)?,
                        None => {
                            reader.skip()?;
                        }
                    }
                }
            }
            Self::Named(len) => {
                for _ in 0..len {
                    let name = reader.text()?;
                    if names.contains(&name) {
                        visit(name, reader)?;
                    } else {
                        reader.skip()?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn stored<'a>(reader: &mut Reader<'a>, fields: Fields) -> Result<Stored<'a>, Unreadable> {
    let mut stored = Stored::default();
    let mut num_required = 0;
    fields.each(&STORED_FIELDS, reader, |name, reader| {
        match name {
            "block_hashes" => stored.hashes = reader.list(engine_hash)?,
            "parent_block_hash" => stored.parent = reader.optional(engine_hash)?,
            "token_ids" => stored.token_ids = reader.list(token_id)?,
            "block_size" => stored.block_size = reader.integer()?,
            "lora_id" => stored.lora_id = reader.optional(Reader::integer)?,
            "medium" => stored.medium = reader.optional(Reader::text)?,
            "lora_name" => stored.lora_name = reader.optional(Reader::text)?,
            "extra_keys" => stored.extra_keys = extra_keys(reader)?,
            "group_idx" => stored.group = reader.optional(Reader::integer)?.unwrap_or(0),
            _ => stored.kind = reader.optional(Reader::text)?,
        }
        num_required += u32::from(STORED_FIELDS[..4].contains(&name));
        Ok(())
    })?;
    if num_required == 4 {
        Ok(stored)
    } else {
        Err(Unreadable)
    }
}

fn removed<'a>(reader: &mut Reader<'a>, fields: Fields) -> Result<Removed<'a>, Unreadable> {
    let mut removed = Removed::default();
    let mut has_hashes = false;
    fields.each(&REMOVED_FIELDS, reader, |name, reader| {
        match name {
            "block_hashes" => {
                removed.hashes = reader.list(engine_hash)?;
                has_hashes = true;
            }
            "medium" => removed.medium = reader.optional(Reader::text)?,
            _ => removed.group = reader.optional(Reader::integer)?.unwrap_or(0),
        }
        Ok(())
    })?;
    if has_hashes {
        Ok(removed)
    } else {
        Err(Unreadable)
    }
}

fn engine_hash(reader: &mut Reader<'_>) -> Result<EngineHash, Unreadable> {
    match reader.head()? {
        Head::Integer(hash) => Ok(hash),
        Head::Bytes(digest) => {
            // A digest of the engine's: any eight bytes of it would do.
            let mut hasher = FxHasher::default();
            hasher.write(digest);
            Ok(hasher.finish())
        }
        _ => Err(Unreadable),
    }
}

fn token_id(reader: &mut Reader<'_>) -> Result<TokenId, Unreadable> {
    TokenId::try_from(reader.integer()?).map_err(|_| Unreadable)
}

/// By block. What has another shape than was documented still tells blocks apart: it is kept as it was packed, for the
/// first block.
fn extra_keys<'a>(reader: &mut Reader<'a>) -> Result<Vec<Vec<ExtraKey<'a>>>, Unreadable> {
    let start = *reader;
    let keys =
        reader.optional(|reader| reader.list(|reader| reader.optional(|it| it.list(extra_key))));
    if let Ok(keys) = keys {
        let keys = keys.unwrap_or_default().into_iter();
        return Ok(keys.map(Option::unwrap_or_default).collect());
    }
    *reader = start;
    Ok(vec![vec![ExtraKey::Packed(reader.skip()?)]])
}

fn extra_key<'a>(reader: &mut Reader<'a>) -> Result<ExtraKey<'a>, Unreadable> {
    let start = *reader;
    if let Ok(text) = reader.text() {
        return Ok(ExtraKey::Text(text));
    }
    *reader = start;
    Ok(ExtraKey::Packed(reader.skip()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::{super::testing::to_msgpack, *};

    fn decoded(event: &Value, check: impl Fn(&Event<'_>)) {
        let packed = to_msgpack(&json!([1.5, [event, ["AllBlocksCleared"]], 0]));
        let events = decode(&packed).unwrap();
        check(&events[0]);
        assert_eq!(events[1..], [Event::Cleared], "the next event is in step");
    }

    fn plain() -> Stored<'static> {
        Stored {
            hashes: vec![7, u64::MAX],
            parent: Some(5),
            token_ids: vec![1, 2, 3, 4],
            block_size: 2,
            ..Stored::default()
        }
    }

    #[test]
    fn each_version_s_form_of_a_stored_block_is_read() {
        // 0.9, 0.10, 0.11 with names of adapters, 0.17 with extra keys, 0.20 with groups: by position.
        let five = json!(["BlockStored", [7, -1], 5, [1, 2, 3, 4], 2, null]);
        decoded(&five, |event| assert_eq!(event, &Event::Stored(plain())));
        let six = json!(["BlockStored", [7, -1], 5, [1, 2, 3, 4], 2, 3, "GPU"]);
        let with_medium = Stored {
            lora_id: Some(3),
            medium: Some("GPU"),
            ..plain()
        };
        decoded(&six, |event| {
            assert_eq!(event, &Event::Stored(with_medium.clone()));
        });
        let full = Stored {
            lora_name: Some("sql"),
            extra_keys: vec![vec![ExtraKey::Text("salt")], vec![]],
            group: 1,
            kind: Some("full_attention"),
            ..with_medium.clone()
        };
        let twelve = json!([
            "BlockStored", [7, -1], 5, [1, 2, 3, 4], 2, 3, "GPU", "sql", [["salt"], null], 1,
            "full_attention", null, {"a field": ["of", "the", "future"]}
        ]);
        decoded(&twelve, |event| {
            assert_eq!(event, &Event::Stored(full.clone()));
        });
        // Since 0.23: by name, in any order.
        let named = json!({
            "kv_cache_spec_kind": "full_attention", "block_hashes": [7, -1], "parent_block_hash": 5,
            "token_ids": [1, 2, 3, 4], "block_size": 2, "lora_id": 3, "medium": "GPU", "lora_name": "sql",
            "extra_keys": [["salt"], null], "type": "BlockStored", "group_idx": 1,
            "a field": {"of": "the future"}
        });
        decoded(&named, |event| {
            assert_eq!(event, &Event::Stored(full.clone()));
        });
    }

    /// Two messages of a real engine, vLLM 0.32.
    #[test]
    fn a_real_engine_s_messages_are_read() {
        let payloads: [&[u8]; 2] = [
            include_bytes!("testdata/vllm_0.32_first.msgpack"),
            include_bytes!("testdata/vllm_0.32_second.msgpack"),
        ];
        let [first, second] = payloads.map(|payload| match &decode(payload).unwrap()[..] {
            [Event::Stored(stored)] => stored.clone(),
            other => panic!("{other:?}"),
        });
        assert_eq!((first.hashes.len(), first.token_ids.len()), (7, 7 * 32));
        assert_eq!(
            (first.parent, second.parent),
            (None, first.hashes.last().copied())
        );
        assert_eq!((second.hashes.len(), second.token_ids.len()), (1, 32));
        for stored in [first, second] {
            assert_eq!((stored.block_size, stored.group), (32, 0));
            assert_eq!(
                (stored.medium, stored.kind),
                (Some("GPU"), Some("full_attention"))
            );
            assert!(stored.extra_keys.iter().all(Vec::is_empty));
        }
    }

    #[test]
    fn removals_are_read_in_both_forms() {
        let removed = |medium, group| {
            Event::Removed(Removed {
                hashes: vec![7],
                medium,
                group,
            })
        };
        decoded(&json!(["BlockRemoved", [7]]), |event| {
            assert_eq!(event, &removed(None, 0));
        });
        decoded(&json!(["BlockRemoved", [7], "CPU", 2, [0]]), |event| {
            assert_eq!(event, &removed(Some("CPU"), 2));
        });
        decoded(
            &json!({"type": "BlockRemoved", "block_hashes": [7]}),
            |event| {
                assert_eq!(event, &removed(None, 0));
            },
        );
        decoded(&json!({"type": "AllBlocksCleared"}), |event| {
            assert_eq!(event, &Event::Cleared);
        });
        decoded(&json!(["BlocksMoved", 1, {"a": [1]}]), |event| {
            assert_eq!(event, &Event::Unknown);
        });
    }

    #[test]
    fn digests_are_told_apart() {
        let digest = |tail: &str| format!("{}{tail}", "ab".repeat(31));
        let packed = |tail: &str| json!(["BlockRemoved", [["0x", digest(tail)]]]);
        let hash = |event: &Event<'_>| match event {
            Event::Removed(removed) => removed.hashes[0],
            _ => 0,
        };
        let hashes = ["00", "00", "01"].map(|tail| {
            let payload = to_msgpack(&json!([0, [packed(tail)]]));
            hash(&decode(&payload).unwrap()[0])
        });
        assert_eq!(hashes[0], hashes[1]);
        assert_ne!(hashes[0], hashes[2]);
    }

    #[test]
    fn a_known_event_that_lacks_something_makes_the_batch_unreadable() {
        let batches = [
            json!([0, [["BlockStored", [7], null, [1, 2]]]]),
            json!([0, [{"type": "BlockStored", "block_hashes": [7], "token_ids": [1], "block_size": 1}]]),
            json!([0, [["BlockStored", [7], null, ["one"], 1]]]),
            json!([0, [["BlockStored", [7], null, [4_294_967_296_u64], 1]]]),
            json!([0, [["BlockRemoved"]]]),
            json!([0, [{"block_hashes": [7]}]]),
            json!([0, [7]]),
            json!([0]),
            json!({"ts": 0}),
            json!(7),
        ];
        for batch in batches {
            let payload = to_msgpack(&batch);
            assert_eq!(decode(&payload), Err(Unreadable), "{batch}");
        }
        let named = to_msgpack(&json!({"data_parallel_rank": 0, "events": [], "ts": 0.5}));
        assert_eq!(decode(&named), Ok(vec![]));
    }

    #[test]
    fn extra_keys_of_another_shape_still_tell_blocks_apart() {
        for keys in [json!({"cache_salt": "a"}), json!([1, 2]), json!("salt")] {
            let event = json!(["BlockStored", [7], null, [1], 1, null, "GPU", null, keys]);
            decoded(&event, |event| {
                let Event::Stored(stored) = event else {
                    panic!("{event:?}")
                };
                assert!(
                    matches!(stored.extra_keys[0][0], ExtraKey::Packed(_)),
                    "{keys}"
                );
            });
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&bytes);
        }

        #[test]
        fn a_spoiled_batch_never_panics(at in 0_usize..200, byte in any::<u8>(), cut in 0_usize..200) {
            let event = json!(["BlockStored", [7, 8], 5, [1, 2, 3, 4], 2, 3, "GPU", "sql", [["salt"], null], 1, "full_attention"]);
            let mut payload = to_msgpack(&json!([1.5, [event, ["BlockRemoved", [7], "GPU"]], 0]));
            let len = payload.len();
            payload[at % len] = byte;
            let _ = decode(&payload);
            let _ = decode(&payload[..cut % len]);
        }
    }
}
