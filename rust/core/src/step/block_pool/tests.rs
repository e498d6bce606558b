use super::*;
use crate::hash::block_hashes;

const SEED: HashSeed = HashSeed(7);

/// A pool with blocks of two tokens.
fn pool(num_blocks: u32) -> BlockPool {
    BlockPool::new(&StepSchedulerConfig {
        num_blocks,
        block_size: 2,
        ..StepSchedulerConfig::default()
    })
}

fn chain<'a>(hashes: &'a [BlockHash], token_ids: &'a [TokenId]) -> Chain<'a> {
    Chain {
        seed: SEED,
        hashes,
        token_ids,
    }
}

fn matched(pool: &BlockPool, chain: Chain<'_>) -> usize {
    let mut blocks = vec![BlockId(99)];
    pool.match_prefix(chain, &mut blocks);
    blocks.len()
}

/// Computes a chain: the table that holds it, and how many of its blocks are cached.
fn compute(pool: &mut BlockPool, chain: Chain<'_>) -> (Vec<BlockId>, usize) {
    let mut table = pool.allocate_table(&[], chain.hashes.len(), 0).unwrap();
    let num_cached = pool.cache_blocks(chain, &mut table, 0).num_cached;
    (table, num_cached)
}

#[test]
fn equal_hashes_of_other_tokens_are_a_miss() {
    let mut pool = pool(8);
    let hashes = [BlockHash(1), BlockHash(2)];
    let (mut first, _) = compute(&mut pool, chain(&hashes, &[1, 2, 3, 4]));
    assert_eq!(matched(&pool, chain(&hashes, &[1, 2, 3, 4])), 2);
    assert_eq!(
        matched(&pool, chain(&hashes, &[1, 2, 3, 5])),
        1,
        "second block differs"
    );
    assert_eq!(
        matched(&pool, chain(&hashes, &[1, 9, 3, 4])),
        0,
        "first block differs"
    );
    pool.release_table(&mut first);
}

#[test]
fn equal_tokens_after_another_parent_or_seed_are_a_miss() {
    let mut pool = pool(8);
    // [1 2] and [5 6] have different hashes, the blocks after them collide and hold the same tokens.
    let (mut first, _) = compute(
        &mut pool,
        chain(&[BlockHash(1), BlockHash(3)], &[1, 2, 9, 9]),
    );
    let (mut other, _) = compute(&mut pool, chain(&[BlockHash(2)], &[5, 6]));
    assert_eq!(
        matched(&pool, chain(&[BlockHash(2), BlockHash(3)], &[5, 6, 9, 9])),
        1
    );

    let hashes = [BlockHash(1)];
    let other_seed = Chain {
        seed: HashSeed(8),
        hashes: &hashes,
        token_ids: &[1, 2],
    };
    assert_eq!(matched(&pool, other_seed), 0);
    pool.release_table(&mut first);
    pool.release_table(&mut other);
}

#[test]
fn a_collision_keeps_the_newcomer_private_until_the_other_is_gone() {
    let mut pool = pool(4);
    let hashes = [BlockHash(1), BlockHash(2)];
    let (mut first, _) = compute(&mut pool, chain(&hashes[..1], &[1, 2]));
    let newcomer = chain(&hashes, &[3, 4, 5, 6]);
    let mut second = pool.allocate_table(&[], 2, 0).unwrap();
    assert_eq!(pool.cache_blocks(newcomer, &mut second, 0).num_cached, 0);
    pool.check_integrity(&[(&first, 1), (&second, 0)], &[]);

    pool.release_table(&mut first);
    while pool.num_available() > 0 {
        first.extend(pool.allocate()); // the last one evicts
    }
    assert_eq!(pool.cache_blocks(newcomer, &mut second, 0).num_cached, 2);
    assert_eq!(matched(&pool, newcomer), 2);
    pool.check_integrity(&[(&first, 0), (&second, 2)], &[]);
}

#[test]
fn equal_content_is_kept_once() {
    let mut pool = pool(8);
    let token_ids = [1, 2, 3, 4, 5, 6];
    let hashes = block_hashes(SEED, &token_ids, 2);
    let (first, _) = compute(&mut pool, chain(&hashes[..2], &token_ids));
    let mut second = pool.allocate_table(&[], 3, 0).unwrap();
    assert_eq!(pool.num_available(), 3);

    let cached = pool.cache_blocks(chain(&hashes, &token_ids), &mut second, 0);
    assert_eq!((cached.num_cached, cached.first_replaced), (3, 0));
    assert_eq!(
        first[..],
        second[..2],
        "the second table shares the first's blocks"
    );
    assert_eq!(pool.num_available(), 5, "and has given its own back");
    assert_eq!(
        pool.take_events(),
        [stored(&hashes[..2]), stored(&hashes[2..])]
    );
    pool.check_integrity(&[(&first, 2), (&second, 3)], &[]);
}

#[test]
fn evicts_the_least_recently_used_chain_and_its_tail_first() {
    let mut pool = pool(5);
    let old = block_hashes(SEED, &[1, 2, 3, 4, 5, 6], 2);
    let new = block_hashes(SEED, &[7, 8, 9, 10], 2);
    let (mut old_table, _) = compute(&mut pool, chain(&old, &[1, 2, 3, 4, 5, 6]));
    let (mut new_table, _) = compute(&mut pool, chain(&new, &[7, 8, 9, 10]));
    pool.release_table(&mut old_table);
    pool.release_table(&mut new_table);
    assert_eq!(pool.take_events(), [stored(&old), stored(&new)]);
    assert_eq!(pool.num_available(), 5);

    let mut writer = Vec::new();
    for _ in 0..5 {
        writer.extend(pool.allocate());
        pool.check_integrity(&[(&writer, 0)], &[]);
    }
    let order = [old[2], old[1], old[0], new[1], new[0]];
    assert_eq!(pool.take_events(), [KvEvent::Removed(order.to_vec())]);
    assert_eq!(pool.allocate(), None);
}

#[test]
fn a_use_makes_a_chain_young_again_and_a_matched_block_is_not_evicted() {
    let mut pool = pool(4);
    let (old, new) = (
        block_hashes(SEED, &[1, 2], 2),
        block_hashes(SEED, &[3, 4], 2),
    );
    for (hashes, token_ids) in [(&old, [1, 2]), (&new, [3, 4])] {
        let (mut table, _) = compute(&mut pool, chain(hashes, &token_ids));
        pool.release_table(&mut table);
    }
    let mut blocks = Vec::new();
    pool.match_prefix(chain(&old, &[1, 2]), &mut blocks);
    let table = pool.allocate_table(&blocks, 4, 0).unwrap();
    assert_eq!(table[0], blocks[0]);
    assert_eq!(
        pool.take_events()[2..],
        [KvEvent::Removed(new)],
        "not the matched one"
    );
    pool.check_integrity(&[(&table, 1)], &[]);
}

#[test]
fn a_table_that_does_not_fit_takes_nothing() {
    let mut pool = pool(4);
    let token_ids = [1, 2, 3, 4];
    let hashes = block_hashes(SEED, &token_ids, 2);
    let (mut first, _) = compute(&mut pool, chain(&hashes, &token_ids));
    let mut blocks = Vec::new();
    pool.match_prefix(chain(&hashes, &token_ids), &mut blocks);
    assert_eq!(
        pool.allocate_table(&blocks, 5, 0),
        None,
        "three more, two are left"
    );
    assert_eq!(
        pool.allocate_table(&blocks, 4, 1),
        None,
        "one of the two is reserved"
    );
    pool.check_integrity(&[(&first, 2)], &[]);
    pool.release_table(&mut first);

    // Held by nobody, the matched blocks themselves count as available and are used up.
    assert_eq!(pool.allocate_table(&blocks, 4, 1), None);
    let table = pool.allocate_table(&blocks, 4, 0).unwrap();
    pool.check_integrity(&[(&table, 2)], &[]);
}

#[test]
fn lists_parents_before_children_where_ids_run_against_the_chain() {
    let mut pool = pool(3);
    let token_ids = [1, 2, 3, 4, 5, 6];
    let hashes = block_hashes(SEED, &token_ids, 2);
    let mut table = pool.allocate_table(&[], 3, 0).unwrap();
    table.reverse();
    pool.cache_blocks(chain(&hashes, &token_ids), &mut table, 0);
    assert_eq!(table, [BlockId(2), BlockId(1), BlockId(0)]);
    assert_eq!(pool.cached_hashes(), hashes);
}

fn stored(hashes: &[BlockHash]) -> KvEvent {
    KvEvent::Stored(hashes.to_vec())
}
