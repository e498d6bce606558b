//! Single decisions under criterion, which keeps the history of runs and says whether a change is a change:
//! `cargo bench -p orchestra-core --bench decisions`. The distributions on a trace are `route_latency`'s and
//! `place_latency`'s.

#![expect(clippy::unwrap_used, reason = "a benchmark fails loudly")]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use orchestra_core::{
    BlockHash, Time, block_hashes,
    scheduler::{
        GpuSpec, HashedPrompt, Layout, PlaceRequest, RouteRequest, Scheduler, SchedulerConfig,
        WorkerId, WorkerSpec,
    },
    step::KvEvent,
};

const BLOCK_SIZE: usize = 16;
const CHAIN_BLOCKS: usize = 16;
/// Conversations; a fifth of the workers hold each, the others only its first block.
const NUM_CONVERSATIONS: u32 = 64;
const SLOT_BYTES: u64 = 64 << 20;

fn spec(index: usize) -> WorkerSpec {
    WorkerSpec {
        name: format!("worker-{index}"),
        model: "model".to_owned(),
        block_size: BLOCK_SIZE as u32,
        num_blocks: 1 << 20,
        max_num_seqs: 256,
        max_model_len: 1 << 20,
        ..WorkerSpec::default()
    }
}

/// A prompt whose first block is everybody's.
fn prompt(conversation: u32) -> Vec<u32> {
    let own = (0..).map(|at| conversation * 1000 + at);
    let rest = own.take((CHAIN_BLOCKS - 1) * BLOCK_SIZE + 1);
    std::iter::repeat_n(7, BLOCK_SIZE).chain(rest).collect()
}

fn chain(conversation: u32) -> Vec<BlockHash> {
    block_hashes(
        spec(0).hash_seed("", None),
        &prompt(conversation),
        BLOCK_SIZE,
    )
}

fn fleet(num_workers: usize) -> (Scheduler, Vec<WorkerId>) {
    let mut scheduler = Scheduler::new(SchedulerConfig::default()).unwrap();
    let ids: Vec<WorkerId> = (0..num_workers)
        .map(|index| scheduler.add_worker(spec(index)).unwrap())
        .collect();
    let chains: Vec<_> = (0..NUM_CONVERSATIONS).map(chain).collect();
    for (index, &id) in ids.iter().enumerate() {
        for (conversation, chain) in chains.iter().enumerate() {
            let is_holder = (index + conversation).is_multiple_of(5);
            let depth = if is_holder {
                1 + (index * 7 + conversation) % CHAIN_BLOCKS
            } else {
                1
            };
            let event = KvEvent::Stored(chain[..depth].to_vec());
            scheduler.apply_kv_event(id, &event).unwrap();
        }
    }
    (scheduler, ids)
}

fn route(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("route, reserve and release");
    for num_workers in [8, 64, 512, 2048, 10_000] {
        let (mut scheduler, _) = fleet(num_workers);
        let prompts: Vec<_> = (0..NUM_CONVERSATIONS)
            .map(|it| (prompt(it), chain(it)))
            .collect();
        let seed = spec(0).hash_seed("", None);
        let mut turn = prompts.iter().cycle();
        group.bench_function(BenchmarkId::from_parameter(num_workers), |bencher| {
            bencher.iter(|| {
                let (token_ids, blocks) = turn.next().unwrap();
                let request = RouteRequest {
                    model: "model",
                    token_ids,
                    max_tokens: 64,
                    hashed: Some(HashedPrompt {
                        seed,
                        block_size: BLOCK_SIZE as u32,
                        blocks,
                    }),
                    ..RouteRequest::default()
                };
                let reservation = scheduler.route(black_box(&request), Time::ZERO).unwrap();
                scheduler.release(reservation.id)
            });
        });
    }
    group.finish();
}

fn kv_events(criterion: &mut Criterion) {
    let (mut scheduler, ids) = fleet(512);
    let chains: Vec<_> = (1000..1064).map(chain).collect();
    let mut turn = chains.iter().zip(&ids).cycle();
    let mut group = criterion.benchmark_group("KV events");
    group.throughput(Throughput::Elements(2 * CHAIN_BLOCKS as u64));
    group.bench_function("store and remove a chain", |bencher| {
        bencher.iter(|| {
            let (chain, &id) = turn.next().unwrap();
            scheduler
                .apply_kv_event(id, &KvEvent::Stored(chain.clone()))
                .unwrap();
            scheduler
                .apply_kv_event(id, &KvEvent::Removed(chain.clone()))
                .unwrap();
        });
    });
    group.finish();
}

fn place(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("place and release, 1,024 GPUs");
    for (name, layout) in [("contiguous", Layout::Contiguous), ("paged", Layout::Paged)] {
        let mut scheduler = Scheduler::new(SchedulerConfig::default()).unwrap();
        for index in 0..1024 {
            let spec = GpuSpec {
                name: format!("gpu-{index}"),
                domain: format!("domain-{}", index / 8),
                node: format!("node-{}", index / 8),
                rack: None,
                memory_bytes: 1280 * SLOT_BYTES,
            };
            scheduler.add_gpu(spec).unwrap();
        }
        // A third of the memory is taken, in pieces of many sizes.
        for index in 0..1024_u64 {
            let request = PlaceRequest {
                num_gpus: 1 << (index % 3),
                bytes_per_gpu: SLOT_BYTES * (20 + index % 300),
                layout,
                ..PlaceRequest::default()
            };
            scheduler.place(&request).unwrap();
        }
        let request = PlaceRequest {
            num_gpus: 4,
            bytes_per_gpu: SLOT_BYTES * 200,
            layout,
            ..PlaceRequest::default()
        };
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let placement = scheduler.place(black_box(&request)).unwrap();
                scheduler.release_placement(placement.id)
            });
        });
    }
    group.finish();
}

criterion_group!(benches, route, kv_events, place);
criterion_main!(benches);
