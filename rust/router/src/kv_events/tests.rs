//! The whole way from an engine's sockets to what the scheduler hears, with a mock of the engine.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use orchestra_core::{BlockHash, block_hashes, scheduler::WorkerSpec, step::KvEvent};
use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::{sync::watch, time::timeout};

use super::{KvEventSource, Loss, follow, testing::MockEngine};
use crate::{metrics::Metrics, tasks::Tasks};

const PATIENCE: Duration = Duration::from_secs(20);

fn spec() -> WorkerSpec {
    WorkerSpec {
        name: "engine".into(),
        model: "model".into(),
        block_size: 2,
        num_blocks: 1000,
        ..WorkerSpec::default()
    }
}

/// The prompt of a family: all begin alike.
fn tokens(family: u32) -> Vec<u32> {
    let token = |at: u32| at + if at < 4 { 0 } else { 100 * (family + 1) };
    (0..12).map(token).collect()
}

fn ours(family: u32) -> Vec<BlockHash> {
    block_hashes(spec().hash_seed("", None), &tokens(family), 2)
}

/// The engine's names, of its own making.
fn theirs(family: u32, at: usize) -> u64 {
    ours(family)[at].0.rotate_left(7)
}

fn stored(family: u32, at: usize) -> Value {
    let parent = at.checked_sub(1).map(|parent| theirs(family, parent));
    let token_ids = &tokens(family)[at * 2..at * 2 + 2];
    json!({"type": "BlockStored", "block_hashes": [theirs(family, at)], "parent_block_hash": parent,
           "token_ids": token_ids, "block_size": 2, "lora_id": null, "medium": "GPU", "lora_name": null})
}

fn removed(family: u32, at: usize) -> Value {
    json!(["BlockRemoved", [theirs(family, at)], "GPU"])
}

/// A subscriber, and what it said so far.
struct Listener {
    held: watch::Receiver<BTreeSet<BlockHash>>,
    metrics: Metrics,
    tasks: Tasks,
    _engine: Arc<MockEngine>,
}

impl Listener {
    fn start(engine: &Arc<MockEngine>, has_replay: bool) -> Self {
        let (sender, held) = watch::channel(BTreeSet::new());
        let apply = move |event: &KvEvent| {
            sender.send_modify(|held: &mut BTreeSet<BlockHash>| match event {
                KvEvent::Stored(hashes) | KvEvent::Kept(hashes) => held.extend(hashes),
                KvEvent::Removed(hashes) => held.retain(|hash| !hashes.contains(hash)),
                KvEvent::Cleared => held.clear(),
            });
            Ok(())
        };
        let source = KvEventSource {
            spec: spec(),
            events: engine.events.clone(),
            replay: has_replay.then(|| engine.replay.clone()),
            topic: "kv".into(),
        };
        let (metrics, tasks) = (Metrics::new(), Tasks::default());
        let series = metrics.kv_events.worker("engine");
        let token = tasks.shutdown_token().clone();
        tasks.spawn(async move {
            tokio::select! {
                biased;
                () = token.cancelled() => {}
                () = follow(source, series, apply) => {}
            }
        });
        Self {
            held,
            metrics,
            tasks,
            _engine: Arc::clone(engine),
        }
    }

    /// Waits until exactly these blocks are held.
    async fn holds(&mut self, blocks: &BTreeSet<BlockHash>) {
        let reached = self.held.wait_for(|held| held == blocks);
        let is_reached = timeout(PATIENCE, reached).await.is_ok();
        let held = self.held.borrow();
        assert!(is_reached, "{held:?} instead of {blocks:?}");
    }

    /// Waits a little for this block to be held; returns all that are.
    async fn sees(&mut self, block: BlockHash) -> Option<BTreeSet<BlockHash>> {
        let seen = self.held.wait_for(|held| held.contains(&block));
        let seen = timeout(Duration::from_millis(100), seen).await;
        seen.ok().map(|held| held.unwrap().clone())
    }

    fn counted(&self, line: &str) -> bool {
        self.metrics.encode().unwrap().contains(line)
    }
}

fn lost(loss: Loss, count: u32) -> String {
    format!(
        "kv_event_losses_total{{reason=\"{}\"}} {count}\n",
        loss.as_str()
    )
}

async fn started(has_replay: bool) -> (Arc<MockEngine>, Listener) {
    let engine = Arc::new(MockEngine::start().await);
    let listener = Listener::start(&engine, has_replay);
    timeout(PATIENCE, engine.subscribed()).await.unwrap();
    (engine, listener)
}

fn blocks(family: u32, count: usize) -> BTreeSet<BlockHash> {
    ours(family)[..count].iter().copied().collect()
}

#[tokio::test]
async fn what_an_engine_stores_and_removes_is_told() {
    let (engine, mut listener) = started(false).await;
    engine.publish(&json!([stored(0, 0), stored(0, 1)]), true);
    listener.holds(&blocks(0, 2)).await;
    engine.publish(&json!([removed(0, 1)]), true);
    listener.holds(&blocks(0, 1)).await;
    assert!(listener.counted("kv_event_batches_total{worker=\"engine\"} 2\n"));
    assert!(listener.counted("kv_event_streams 1\n"));
    engine.publish(
        &json!([stored(0, 1), {"type": "AllBlocksCleared"}, stored(0, 0)]),
        true,
    );
    listener.holds(&blocks(0, 1)).await;
    listener.tasks.shut_down().await;
    assert!(!listener.counted("worker=\"engine\""));
}

/// An engine with a replay that is not asked until something is missing.
async fn started_live(num_blocks: usize) -> (Arc<MockEngine>, Listener) {
    let engine = Arc::new(MockEngine::start().await);
    engine.refuse_replays(true);
    let mut listener = Listener::start(&engine, true);
    timeout(PATIENCE, engine.subscribed()).await.unwrap();
    for at in 0..num_blocks {
        engine.publish(&json!([stored(0, at)]), true);
    }
    listener.holds(&blocks(0, num_blocks)).await;
    engine.refuse_replays(false);
    (engine, listener)
}

#[tokio::test]
async fn a_gap_is_filled_by_the_engine_s_replay() {
    let (engine, mut listener) = started_live(1).await;
    // What it sends of a replay is less than the gap, as after a socket's high-water mark.
    engine.limit_replays(2);
    for at in 1..6 {
        engine.publish(&json!([stored(0, at)]), at == 5);
    }
    listener.holds(&blocks(0, 6)).await;
    // Counted once the engine had no more to send.
    let counted = async {
        while !listener.counted("kv_event_gaps_replayed_total 1\n") {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    assert!(timeout(PATIENCE, counted).await.is_ok());
    assert!(listener.counted(&lost(Loss::Gap, 0)));
}

#[tokio::test]
async fn what_was_published_before_is_asked_for() {
    let engine = Arc::new(MockEngine::start().await);
    for at in 0..3 {
        engine.publish(&json!([stored(0, at)]), true);
    }
    let mut listener = Listener::start(&engine, true);
    listener.holds(&blocks(0, 3)).await;
}

#[tokio::test]
async fn without_a_replay_a_gap_forgets_everything_before_it() {
    let (engine, mut listener) = started(false).await;
    engine.publish(&json!([stored(0, 0), stored(0, 1)]), true);
    listener.holds(&blocks(0, 2)).await;
    engine.publish(&json!([removed(0, 1)]), false);
    engine.publish(&json!([stored(0, 2), stored(1, 0)]), true);
    listener.holds(&blocks(1, 1)).await;
    assert!(listener.counted(&lost(Loss::Gap, 1)));
    assert!(listener.counted("kv_events_ignored_total{reason=\"unknown_parent\"} 1\n"));
}

#[tokio::test]
async fn a_gap_that_the_engine_forgot_too_starts_anew() {
    let (engine, mut listener) = started_live(2).await;
    engine.publish(&json!([removed(0, 1)]), false);
    engine.publish(&json!([stored(1, 0), stored(1, 1)]), false);
    engine.keep(1);
    engine.publish(&json!([stored(1, 2)]), true);
    listener.holds(&blocks(1, 3)).await;
    assert!(listener.counted(&lost(Loss::Gap, 1)));
}

#[tokio::test]
async fn a_broken_connection_is_caught_up_with() {
    let (engine, mut listener) = started(true).await;
    engine.publish(&json!([stored(0, 0), stored(0, 1)]), true);
    listener.holds(&blocks(0, 2)).await;
    engine.cut();
    engine.publish(&json!([removed(0, 1)]), true);
    listener.holds(&blocks(0, 1)).await;
    assert!(listener.counted(&lost(Loss::Restart, 0)));
}

#[tokio::test]
async fn a_restarted_engine_holds_nothing_of_before() {
    let (engine, mut listener) = started(true).await;
    engine.publish(&json!([stored(0, 0), stored(0, 1)]), true);
    listener.holds(&blocks(0, 2)).await;
    // It says nothing: that it is another process is found out by asking.
    engine.restart();
    listener.holds(&BTreeSet::new()).await;
    assert!(listener.counted(&lost(Loss::Restart, 1)));
    // The same number as before, another message.
    engine.publish(&json!([stored(1, 0)]), true);
    listener.holds(&blocks(1, 1)).await;
    engine.restart();
    engine.publish(&json!([stored(1, 0), stored(1, 1)]), true);
    listener.holds(&blocks(1, 2)).await;
}

#[tokio::test]
async fn without_a_replay_a_broken_connection_forgets() {
    let (engine, mut listener) = started(false).await;
    engine.publish(&json!([stored(0, 0)]), true);
    listener.holds(&blocks(0, 1)).await;
    engine.cut();
    listener.holds(&BTreeSet::new()).await;
    assert!(listener.counted(&lost(Loss::Disconnect, 1)));
}

#[tokio::test]
async fn a_message_that_cannot_be_read_forgets_and_the_next_one_is_taken() {
    let (engine, mut listener) = started(false).await;
    engine.publish(&json!([stored(0, 0)]), true);
    listener.holds(&blocks(0, 1)).await;
    engine.publish_bytes(b"\xc1 is in no version of the format".to_vec(), true);
    listener.holds(&BTreeSet::new()).await;
    assert!(listener.counted(&lost(Loss::Unreadable, 1)));
    engine.publish(&json!([stored(0, 0)]), true);
    listener.holds(&blocks(0, 1)).await;
}

#[tokio::test]
async fn a_worker_that_is_gone_ends_the_task() {
    let engine = MockEngine::start().await;
    let source = KvEventSource {
        spec: spec(),
        events: engine.events.clone(),
        replay: None,
        topic: "kv".into(),
    };
    let metrics = Metrics::new();
    let gone = |_: &KvEvent| Err(orchestra_core::scheduler::SchedulerError::UnknownWorker);
    let following = follow(source, metrics.kv_events.worker("engine"), gone);
    let publishing = async {
        engine.subscribed().await;
        engine.publish(&json!([stored(0, 0)]), true);
    };
    let ended = timeout(PATIENCE, async { tokio::join!(following, publishing) });
    assert!(ended.await.is_ok());
}

/// What happens to an engine and to the way from it.
#[derive(Clone, Debug)]
enum Op {
    /// Stores the next block of a family, and whether the message arrives.
    Store(u32, bool),
    /// Removes the last one.
    Remove(u32, bool),
    Clear(bool),
    Cut,
    Restart,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (0_u32..3, prop::bool::weighted(0.8)).prop_map(|(family, is_sent)| Op::Store(family, is_sent)),
        4 => (0_u32..3, prop::bool::weighted(0.8)).prop_map(|(family, is_sent)| Op::Remove(family, is_sent)),
        1 => any::<bool>().prop_map(Op::Clear),
        1 => Just(Op::Cut),
        1 => Just(Op::Restart),
    ]
}

/// Plays the operations; then a block of a family of its own, which is sent until it is heard.
async fn play(ops: &[Op], has_replay: bool) {
    const LAST: u32 = 9;
    let (engine, mut listener) = started(has_replay).await;
    // Blocks of each family that the engine holds. The first two are the same for all, so it holds them in copies.
    let mut depths = [0_usize; 3];
    for op in ops {
        match *op {
            Op::Store(family, is_sent) => {
                let depth = &mut depths[family as usize];
                if *depth < 6 {
                    engine.publish(&json!([stored(family, *depth)]), is_sent);
                    *depth += 1;
                }
            }
            Op::Remove(family, is_sent) => {
                let depth = &mut depths[family as usize];
                if *depth > 0 {
                    *depth -= 1;
                    engine.publish(&json!([removed(family, *depth)]), is_sent);
                }
            }
            Op::Clear(is_sent) => {
                engine.publish(&json!([["AllBlocksCleared"]]), is_sent);
                depths = [0; 3];
            }
            Op::Cut => engine.cut(),
            Op::Restart => {
                engine.restart();
                depths = [0; 3];
            }
        }
    }
    let mut held = blocks(LAST, 3);
    for (family, &depth) in (0..).zip(&depths) {
        held.extend(blocks(family, depth));
    }
    let publish = || {
        engine.publish(
            &json!([stored(LAST, 0), stored(LAST, 1), stored(LAST, 2)]),
            true,
        );
    };
    if has_replay {
        publish();
        listener.holds(&held).await;
    } else {
        // Nobody may be listening yet: once more then. A block that is stored again is still one block.
        let said = timeout(PATIENCE, async {
            loop {
                publish();
                if let Some(said) = listener.sees(ours(LAST)[2]).await {
                    return said;
                }
            }
        });
        let said = said.await.unwrap();
        assert!(said.is_subset(&held), "{said:?} is more than {held:?}");
    }
    listener.tasks.shut_down().await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_lost_is_replayed_or_not_claimed(ops in prop::collection::vec(op(), 0..25), has_replay in any::<bool>()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(play(&ops, has_replay));
    }
}
