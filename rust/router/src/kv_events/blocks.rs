//! What one engine holds, in our names: from the tokens of its events.
//!
//! An engine names its blocks by hashes of its own, which depend on its version, its settings and its process. Ours is
//! [`next_block_hash`] over the same tokens, so what an engine calls a block is remembered only to find the block again:
//! as a parent, and when it is removed.
//!
//! An engine may hold a block twice (two requests computed it side by side); it then stores and removes it twice, and
//! the block counts as held until the last time. A block that follows one we do not know has no identity and is left
//! out. Where two of an engine's names are one of ours (events of before 2026 do not tell salts and images apart), the
//! block counts as gone when either is. In short: never a hit that is not there.
//!
//! Memory: 24 bytes a block in a hash map, for at most as many blocks as the engine has.

use std::hash::Hasher;

use orchestra_core::{
    BlockHash,
    hash::next_block_hash,
    scheduler::{Lora, WorkerSpec},
    step::KvEvent,
};
use rustc_hash::{FxHashMap, FxHasher};

use super::batch::{EngineHash, Event, ExtraKey, Removed, Stored};

/// Where the GPU's blocks are; an engine without tiers names none.
const MEDIUM_GPU: &str = "GPU";
/// Layers that see all tokens: a prefix is reusable if these have it. Others (sliding windows, states) keep less.
const KINDS_FULL: [&str; 3] = ["full_attention", "mla_attention", "sink_full_attention"];

/// Why an event's blocks were left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ignored {
    /// The block before the first one is not known.
    UnknownParent,
    /// Blocks of another size than the worker was registered with.
    OtherBlockSize,
    /// The tokens are not those of the blocks, or none are given.
    NoTokens,
    /// Not in the GPU's memory.
    OtherMedium,
    /// Of layers that do not see all tokens.
    OtherAttention,
    /// Of a type that is not known.
    UnknownType,
}

impl Ignored {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::UnknownParent,
        Self::OtherBlockSize,
        Self::NoTokens,
        Self::OtherMedium,
        Self::OtherAttention,
        Self::UnknownType,
    ];

    /// As metrics spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::UnknownParent => "unknown_parent",
            Self::OtherBlockSize => "other_block_size",
            Self::NoTokens => "no_tokens",
            Self::OtherMedium => "other_medium",
            Self::OtherAttention => "other_attention",
            Self::UnknownType => "unknown_type",
        }
    }
}

/// An engine reports more blocks than it was registered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TooManyBlocks;

/// A block under one of the engine's names.
#[derive(Clone, Copy, Debug)]
struct Known {
    ours: BlockHash,
    /// How often it is stored.
    num_copies: u32,
}

/// The blocks of one engine.
#[derive(Debug)]
pub(super) struct EngineBlocks {
    spec: WorkerSpec,
    known: FxHashMap<EngineHash, Known>,
}

impl EngineBlocks {
    pub(super) fn new(spec: WorkerSpec) -> Self {
        Self {
            spec,
            known: FxHashMap::default(),
        }
    }

    /// Nothing is known of the engine's cache any more.
    pub(super) fn clear(&mut self) {
        self.known = FxHashMap::default();
    }

    /// What an event changes, in our names; `Ok(Err(_))` where it was left out, which it is whole.
    pub(super) fn apply(
        &mut self,
        event: &Event<'_>,
    ) -> Result<Result<KvEvent, Ignored>, TooManyBlocks> {
        match event {
            Event::Stored(stored) => match self.check(stored) {
                Ok(parent) => self.store(stored, parent).map(Ok),
                Err(ignored) => Ok(Err(ignored)),
            },
            Event::Removed(removed) => Ok(if is_gpu(removed.medium) {
                Ok(self.remove(removed))
            } else {
                Err(Ignored::OtherMedium)
            }),
            Event::Cleared => {
                self.clear();
                Ok(Ok(KvEvent::Cleared))
            }
            Event::Unknown => Ok(Err(Ignored::UnknownType)),
        }
    }

    /// The hash that the first of the blocks follows.
    fn check(&self, stored: &Stored<'_>) -> Result<u64, Ignored> {
        if !is_gpu(stored.medium) {
            return Err(Ignored::OtherMedium);
        }
        if stored.kind.is_some_and(|kind| !KINDS_FULL.contains(&kind)) {
            return Err(Ignored::OtherAttention);
        }
        if stored.block_size != u64::from(self.spec.block_size) {
            return Err(Ignored::OtherBlockSize);
        }
        let num_tokens = stored.hashes.len() as u64 * stored.block_size;
        if num_tokens != stored.token_ids.len() as u64 {
            return Err(Ignored::NoTokens);
        }
        match stored.parent {
            None => Ok(self.seed(stored)),
            Some(parent) => {
                let known = self.known.get(&named(stored.group, parent));
                known
                    .map(|known| known.ours.0)
                    .ok_or(Ignored::UnknownParent)
            }
        }
    }

    /// Start of the chain: a single text besides the tokens of the first block is the salt that the client sent.
    fn seed(&self, stored: &Stored<'_>) -> u64 {
        let unnamed = stored.lora_id.map(|id| format!("lora-{id}"));
        let id = stored.lora_name.or(unnamed.as_deref());
        let lora = id.map(|id| Lora { id, version: 0 });
        let salt = salt(&extra_keys(stored, 0)).unwrap_or("");
        self.spec.hash_seed(salt, lora).0
    }

    fn store(&mut self, stored: &Stored<'_>, mut parent: u64) -> Result<KvEvent, TooManyBlocks> {
        let mut held = Vec::with_capacity(stored.hashes.len());
        let blocks = stored.token_ids.chunks_exact(self.spec.block_size as usize);
        for (index, (&hash, token_ids)) in stored.hashes.iter().zip(blocks).enumerate() {
            let extra = extra_keys(stored, index);
            if !extra.is_empty() && (index > 0 || stored.parent.is_some() || salt(&extra).is_none())
            {
                parent = folded(parent, &extra);
            }
            let ours = next_block_hash(parent, token_ids);
            parent = ours.0;
            let name = named(stored.group, hash);
            if let Some(known) = self.known.get_mut(&name) {
                known.num_copies = known.num_copies.saturating_add(1);
                parent = known.ours.0;
                continue;
            }
            if self.known.len() >= self.spec.num_blocks as usize {
                return Err(TooManyBlocks);
            }
            let known = Known {
                ours,
                num_copies: 1,
            };
            self.known.insert(name, known);
            held.push(ours);
        }
        Ok(KvEvent::Stored(held))
    }

    fn remove(&mut self, removed: &Removed<'_>) -> KvEvent {
        let mut gone = Vec::with_capacity(removed.hashes.len());
        for &hash in &removed.hashes {
            let name = named(removed.group, hash);
            let Some(known) = self.known.get_mut(&name) else {
                continue;
            };
            known.num_copies -= 1;
            if known.num_copies > 0 {
                continue;
            }
            gone.push(known.ours);
            self.known.remove(&name);
        }
        KvEvent::Removed(gone)
    }
}

fn is_gpu(medium: Option<&str>) -> bool {
    medium.is_none_or(|medium| medium == MEDIUM_GPU)
}

/// Groups of layers name their blocks alike.
fn named(group: u64, hash: EngineHash) -> EngineHash {
    hash ^ group.wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// What the identity of a block covers besides its tokens and its adapter, which is in the seed.
fn extra_keys<'a>(stored: &Stored<'a>, index: usize) -> Vec<ExtraKey<'a>> {
    let keys = stored.extra_keys.get(index).into_iter().flatten().copied();
    let adapter = stored.lora_name.map(ExtraKey::Text);
    keys.filter(|&key| Some(key) != adapter).collect()
}

/// The salt, if that is all that there is.
fn salt<'a>(extra: &[ExtraKey<'a>]) -> Option<&'a str> {
    match extra {
        [ExtraKey::Text(salt)] => Some(salt),
        _ => None,
    }
}

/// A parent for blocks that nothing but these keys tells apart.
fn folded(parent: u64, extra: &[ExtraKey<'_>]) -> u64 {
    let mut hasher = FxHasher::default();
    hasher.write_u64(parent);
    for key in extra {
        match key {
            ExtraKey::Text(text) => hasher.write(text.as_bytes()),
            ExtraKey::Packed(bytes) => hasher.write(bytes),
        }
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use orchestra_core::block_hashes;
    use proptest::prelude::*;

    use super::*;

    fn spec() -> WorkerSpec {
        WorkerSpec {
            name: "engine".into(),
            model: "model".into(),
            block_size: 2,
            num_blocks: 20,
            ..WorkerSpec::default()
        }
    }

    fn blocks() -> EngineBlocks {
        EngineBlocks::new(spec())
    }

    fn chain(token_ids: &[u32], salt: &str) -> Vec<BlockHash> {
        block_hashes(spec().hash_seed(salt, None), token_ids, 2)
    }

    fn stored(hashes: &[u64], parent: Option<u64>, token_ids: &[u32]) -> Stored<'static> {
        Stored {
            hashes: hashes.to_vec(),
            parent,
            token_ids: token_ids.to_vec(),
            block_size: 2,
            ..Stored::default()
        }
    }

    fn removed(hashes: &[u64]) -> Event<'static> {
        Event::Removed(Removed {
            hashes: hashes.to_vec(),
            ..Removed::default()
        })
    }

    fn applied(blocks: &mut EngineBlocks, event: &Event<'_>) -> KvEvent {
        blocks.apply(event).unwrap().unwrap()
    }

    #[test]
    fn blocks_get_the_names_that_a_request_for_them_has() {
        let mut blocks = blocks();
        let token_ids = [1, 2, 3, 4, 5, 6];
        let ours = chain(&token_ids, "");
        let first = Event::Stored(stored(&[70, 71], None, &token_ids[..4]));
        assert_eq!(
            applied(&mut blocks, &first),
            KvEvent::Stored(ours[..2].to_vec())
        );
        let next = Event::Stored(stored(&[72], Some(71), &token_ids[4..]));
        assert_eq!(
            applied(&mut blocks, &next),
            KvEvent::Stored(ours[2..].to_vec())
        );
        assert_eq!(
            applied(&mut blocks, &removed(&[72, 99])),
            KvEvent::Removed(ours[2..].to_vec())
        );
        assert_eq!(
            blocks.apply(&Event::Stored(stored(&[73], Some(72), &[7, 8]))),
            Ok(Err(Ignored::UnknownParent))
        );
    }

    #[test]
    fn a_block_that_is_there_twice_goes_with_the_second() {
        let mut blocks = blocks();
        let event = Event::Stored(stored(&[7], None, &[1, 2]));
        let ours = chain(&[1, 2], "");
        assert_eq!(applied(&mut blocks, &event), KvEvent::Stored(ours.clone()));
        assert_eq!(applied(&mut blocks, &event), KvEvent::Stored(vec![]));
        assert_eq!(
            applied(&mut blocks, &removed(&[7])),
            KvEvent::Removed(vec![])
        );
        assert_eq!(applied(&mut blocks, &removed(&[7])), KvEvent::Removed(ours));
    }

    #[test]
    fn what_is_not_the_prompt_s_prefix_on_the_gpu_is_left_out() {
        let cases = [
            (
                Ignored::OtherMedium,
                Stored {
                    medium: Some("CPU"),
                    ..stored(&[7], None, &[1, 2])
                },
            ),
            (
                Ignored::OtherAttention,
                Stored {
                    kind: Some("sliding_window"),
                    ..stored(&[7], None, &[1, 2])
                },
            ),
            (
                Ignored::OtherBlockSize,
                Stored {
                    block_size: 4,
                    ..stored(&[7], None, &[1, 2, 3, 4])
                },
            ),
            (Ignored::NoTokens, stored(&[7], None, &[])),
            (Ignored::NoTokens, stored(&[7], None, &[1, 2, 3, 4])),
            (Ignored::UnknownParent, stored(&[7], Some(1), &[1, 2])),
        ];
        let mut blocks = blocks();
        for (ignored, event) in cases {
            assert_eq!(blocks.apply(&Event::Stored(event)), Ok(Err(ignored)));
        }
        assert!(blocks.known.is_empty());
        assert_eq!(blocks.apply(&Event::Unknown), Ok(Err(Ignored::UnknownType)));
        let elsewhere = Removed {
            hashes: vec![7],
            medium: Some("CPU"),
            group: 0,
        };
        assert_eq!(
            blocks.apply(&Event::Removed(elsewhere)),
            Ok(Err(Ignored::OtherMedium))
        );
    }

    #[test]
    fn salts_adapters_and_images_are_told_apart() {
        let with = |extra: Vec<Vec<ExtraKey<'static>>>, lora_name| Stored {
            extra_keys: extra,
            lora_name,
            ..stored(&[7, 8], None, &[1, 2, 3, 4])
        };
        let names = |event: Stored<'_>| match applied(&mut blocks(), &Event::Stored(event)) {
            KvEvent::Stored(names) | KvEvent::Kept(names) => names,
            other => panic!("{other:?}"),
        };
        let text = |text| vec![ExtraKey::Text(text)];
        assert_eq!(
            names(with(vec![text("s")], None)),
            chain(&[1, 2, 3, 4], "s")
        );
        let sql = Some(Lora {
            id: "sql",
            version: 0,
        });
        let adapted = block_hashes(spec().hash_seed("", sql), &[1, 2, 3, 4], 2);
        assert_eq!(
            names(with(vec![text("sql"), text("sql")], Some("sql"))),
            adapted
        );
        // An image in the second block: the first one is the plain prompt's.
        let plain = chain(&[1, 2, 3, 4], "");
        let image = names(with(vec![vec![], text("image")], None));
        assert_eq!(image[0], plain[0]);
        assert_ne!(image[1], plain[1]);
        let packed = names(with(vec![vec![ExtraKey::Packed(b"x")]], None));
        assert_ne!(packed[0], plain[0]);
    }

    #[test]
    fn more_blocks_than_the_engine_has_are_refused() {
        let mut blocks = blocks();
        let hashes: Vec<u64> = (0..21).collect();
        let token_ids: Vec<u32> = (0..42).collect();
        let event = Event::Stored(stored(&hashes, None, &token_ids));
        assert_eq!(blocks.apply(&event), Err(TooManyBlocks));
    }

    proptest! {
        /// Against an engine that holds copies of blocks: what we say is held is what it holds.
        #[test]
        fn held_blocks_equal_the_engine_s(ops in prop::collection::vec((0_u64..4, 0_usize..8, any::<bool>()), 1..60)) {
            let mut blocks = EngineBlocks::new(WorkerSpec { num_blocks: 1000, ..spec() });
            let mut held = BTreeSet::new();
            let mut copies: BTreeMap<BlockHash, u32> = BTreeMap::new();
            for (family, at, stores) in ops {
                // Families share the first four blocks.
                let token = |position: u32| position + if position < 8 { 0 } else { 100 * (family as u32 + 1) };
                let token_ids: Vec<u32> = (0..16).map(token).collect();
                let ours = chain(&token_ids, "");
                let name = |index: usize| ours[index].0 ^ 5;
                let event = if stores {
                    let parent = at.checked_sub(1).map(name);
                    if parent.is_some() && !copies.contains_key(&ours[at - 1]) {
                        continue;
                    }
                    *copies.entry(ours[at]).or_default() += 1;
                    Event::Stored(stored(&[name(at)], parent, &token_ids[at * 2..at * 2 + 2]))
                } else {
                    if let Some(count) = copies.get_mut(&ours[at]) {
                        *count -= 1;
                    }
                    copies.retain(|_, count| *count > 0);
                    removed(&[name(at)])
                };
                match applied(&mut blocks, &event) {
                    KvEvent::Stored(names) | KvEvent::Kept(names) => held.extend(names),
                    KvEvent::Removed(names) => held.retain(|name| !names.contains(name)),
                    KvEvent::Cleared => held.clear(),
                }
                prop_assert!(held.iter().eq(copies.keys()));
            }
        }
    }
}
