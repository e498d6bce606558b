//! Two processes' worth of blocks, each with what its owner last wrote there.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use orchestra_core::Time;
use orchestra_memory::{
    BlockHandle, BlockSet, BlockState, BufferManager, Event, GrantId, Lease, ManagerConfig,
    MemoryError, PeerId, Pool, PoolConfig, RemoteGrant, Rights, Transfer, TransferError,
    TransferOptions,
};

use crate::{
    Op,
    fabric::{Draw, Fabric},
};

const BLOCK_BYTES: u64 = 4099;
/// Blocks that are not ballast: few, so that freed ones are soon somebody else's.
const USED: u32 = 40;
const LEASE: Duration = Duration::from_millis(150);

/// How often a rare path was taken.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) puts: usize,
    pub(crate) gets: usize,
    pub(crate) timeouts_with_quarantine: usize,
    pub(crate) stale_arrivals: usize,
    pub(crate) expired: usize,
    pub(crate) came_back_from_quarantine: usize,
}

impl Seen {
    pub(crate) fn add(&mut self, more: &Self) {
        self.puts += more.puts;
        self.gets += more.gets;
        self.timeouts_with_quarantine += more.timeouts_with_quarantine;
        self.stale_arrivals += more.stale_arrivals;
        self.expired += more.expired;
        self.came_back_from_quarantine += more.came_back_from_quarantine;
    }
}

/// Sealed blocks with the tag of each one's bytes.
struct Sealed {
    set: BlockSet,
    tags: Vec<u64>,
}

/// A grant on its way to the other node.
struct Offer {
    grant: RemoteGrant,
    /// What a reader will find.
    tags: Vec<u64>,
}

struct Getting {
    transfer: Transfer,
    set: BlockSet,
    tags: Vec<u64>,
}

struct Node {
    manager: BufferManager,
    pool: Arc<Pool>,
    _ballast: BlockSet,
    peer: PeerId,
    sealed: Vec<Sealed>,
    /// Blocks that the other node may fill.
    filling: BTreeMap<GrantId, BlockSet>,
    puts: Vec<Transfer>,
    gets: Vec<Getting>,
    offers: Vec<Offer>,
    quarantined: usize,
}

pub(crate) struct World {
    fabric: Fabric,
    nodes: [Node; 2],
    draw: Draw,
    now: Time,
    next_tag: u64,
    epoch: u64,
    /// Names of closed connections that nobody has proven to be quiet.
    ghosts: Vec<[PeerId; 2]>,
    seen: Seen,
}

/// Bytes that only this tag has. Pieces that land in each other's place show, too: their length is no multiple of 24.
fn pattern(tag: u64) -> Vec<u8> {
    let words = [tag, !tag, tag.wrapping_mul(0x9E37_79B9)].map(u64::to_le_bytes);
    let mut bytes = words.concat().repeat(BLOCK_BYTES.div_ceil(24) as usize);
    bytes.truncate(BLOCK_BYTES as usize);
    bytes
}

/// The field that a manager refuses where a pool has slabs of this size; none of it is touched.
pub(crate) fn largest_slab(slab_bytes: u64) -> Option<&'static str> {
    let transport = Arc::new(Fabric::default().end(0));
    let manager = BufferManager::new(PeerId(0), ManagerConfig::default(), vec![transport]);
    let pool = manager.unwrap().create_pool(PoolConfig {
        slab_bytes,
        prefault: false,
        ..PoolConfig::default()
    });
    match pool {
        Err(MemoryError::InvalidField { field, .. }) => Some(field),
        other => other.map(|_| None).unwrap(),
    }
}

fn node(fabric: &Fabric, at: usize) -> Node {
    let config = ManagerConfig {
        // Three blocks: most transfers are posted in parts.
        inflight_bytes_max: 3 * BLOCK_BYTES,
        lease_grace: Duration::from_millis(5),
        max_quarantined_blocks: 24,
        ..ManagerConfig::default()
    };
    let transport = Arc::new(fabric.end(at));
    let manager = BufferManager::new(PeerId(at as u64), config, vec![transport]).unwrap();
    let pool = PoolConfig {
        block_bytes: BLOCK_BYTES,
        slab_bytes: 2 << 20,
        ..PoolConfig::default()
    };
    let pool = manager.create_pool(pool).unwrap();
    let ballast = pool
        .allocate(pool.config().slots_per_slab() - USED)
        .unwrap();
    Node {
        manager,
        pool,
        _ballast: ballast,
        peer: PeerId(0),
        sealed: Vec::new(),
        filling: BTreeMap::new(),
        puts: Vec::new(),
        gets: Vec::new(),
        offers: Vec::new(),
        quarantined: 0,
    }
}

impl Node {
    fn refused(refused: &MemoryError) {
        let is_expected = matches!(
            refused,
            MemoryError::Exhausted { .. }
                | MemoryError::LimitReached { .. }
                | MemoryError::UnknownPeer
                | MemoryError::GrantEnded
        );
        assert!(is_expected, "{refused}");
    }

    fn allocate(&self, n: u32) -> Option<BlockSet> {
        self.manager
            .allocate(&self.pool, n)
            .inspect_err(Self::refused)
            .ok()
    }

    fn check_bytes(&self, handle: BlockHandle, tag: u64) {
        let mut bytes = vec![0; BLOCK_BYTES as usize];
        self.pool.pin(handle).unwrap().read(0, &mut bytes).unwrap();
        assert!(
            bytes == pattern(tag),
            "{handle:?} holds bytes that are not its owner's"
        );
    }
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let fabric = Fabric::default();
        let nodes = [0, 1].map(|at| node(&fabric, at));
        let mut world = Self {
            fabric,
            nodes,
            draw: Draw(seed),
            now: Time(1_000_000),
            next_tag: 1,
            epoch: 0,
            ghosts: Vec::new(),
            seen: Seen::default(),
        };
        world.connect();
        world
    }

    /// Connects both nodes, each by a name that it never had.
    fn connect(&mut self) {
        self.epoch += 2;
        for at in 0..2 {
            let metadata = self.nodes[1 - at].manager.local_metadata("fabric").unwrap();
            let peer = PeerId((self.epoch + at as u64) * 10);
            self.nodes[at].peer = peer;
            self.nodes[at]
                .manager
                .connect(peer, "fabric", &metadata)
                .unwrap();
        }
    }

    fn pick<T>(draw: &mut Draw, items: &[T]) -> Option<usize> {
        (!items.is_empty()).then(|| draw.below(items.len()))
    }

    pub(crate) fn apply(&mut self, op: &Op) {
        match *op {
            Op::Fill { node, n } => self.fill(node, n),
            Op::Drop { node } => {
                if let Some(at) = Self::pick(&mut self.draw, &self.nodes[node].sealed) {
                    self.nodes[node].sealed.swap_remove(at);
                }
            }
            Op::OfferWrite { node, n } => {
                if let Some(set) = self.nodes[node].allocate(n) {
                    self.offer(node, &set, Rights::Write, Vec::new())
                        .map(|id| self.nodes[node].filling.insert(id, set));
                }
            }
            Op::OfferRead { node } => {
                if let Some(at) = Self::pick(&mut self.draw, &self.nodes[node].sealed) {
                    let sealed = self.nodes[node].sealed.swap_remove(at);
                    self.offer(node, &sealed.set, Rights::Read, sealed.tags.clone());
                    self.nodes[node].sealed.push(sealed);
                }
            }
            Op::Put { node, timeout_ms } => self.put(node, timeout_ms),
            Op::Get { node, timeout_ms } => self.get(node, timeout_ms),
            Op::Abort { node } => {
                if let Some(at) = Self::pick(&mut self.draw, &self.nodes[node].puts) {
                    self.nodes[node].puts[at].abort();
                }
            }
            Op::Revoke { node } => {
                let open: Vec<GrantId> = self.nodes[node].filling.keys().copied().collect();
                if let Some(at) = Self::pick(&mut self.draw, &open) {
                    // Where the peer is known to be gone, there is nothing left to revoke.
                    let revoked = self.nodes[node].manager.revoke(open[at]);
                    assert!(matches!(revoked, Ok(()) | Err(MemoryError::GrantEnded)));
                    self.nodes[node].filling.remove(&open[at]);
                }
            }
            Op::Step { n } => self.fabric.step(n, &mut self.draw),
            Op::Fail => self.fabric.fail_one(&mut self.draw),
            Op::Tick { ms } => self.now = self.now + Duration::from_millis(ms),
            Op::Reconnect { proves, is_cut } => self.reconnect(proves, is_cut),
        }
        for node in 0..2 {
            self.progress(node);
        }
    }

    fn fill(&mut self, node: usize, n: u32) {
        let Some(set) = self.nodes[node].allocate(n) else {
            return;
        };
        let tags: Vec<u64> = (0..u64::from(n)).map(|at| self.next_tag + at).collect();
        self.next_tag += u64::from(n);
        for (at, &tag) in tags.iter().enumerate() {
            set.write(at, 0, &pattern(tag)).unwrap();
        }
        set.seal().unwrap();
        self.nodes[node].sealed.push(Sealed { set, tags });
    }

    fn offer(
        &mut self,
        node: usize,
        set: &BlockSet,
        rights: Rights,
        tags: Vec<u64>,
    ) -> Option<GrantId> {
        let peer = self.nodes[node].peer;
        let lease = Lease {
            peer,
            rights,
            lasts: LEASE,
        };
        let Node { manager, pool, .. } = &self.nodes[node];
        let granted = manager.grant(pool, &set.handles(), lease, self.now);
        let grant = granted.inspect_err(Node::refused).ok()?;
        let far = &mut self.nodes[1 - node];
        let bytes = grant.encode(self.now);
        let received = RemoteGrant::decode(&bytes, far.peer, self.now, 100).unwrap();
        far.offers.push(Offer {
            grant: received,
            tags,
        });
        Some(grant.id)
    }

    fn take_offer(&mut self, node: usize, rights: Rights) -> Option<Offer> {
        let offers = &mut self.nodes[node].offers;
        let at = offers
            .iter()
            .position(|offer| offer.grant.rights == rights)?;
        Some(offers.swap_remove(at))
    }

    fn put(&mut self, node: usize, timeout_ms: u64) {
        let Some(offer) = self.take_offer(node, Rights::Write) else {
            return;
        };
        let n = offer.grant.blocks.len();
        let Node {
            manager,
            pool,
            sealed,
            ..
        } = &self.nodes[node];
        let Some(source) = sealed.iter().find(|sealed| sealed.tags.len() >= n) else {
            return;
        };
        let options = TransferOptions {
            timeout: Duration::from_millis(timeout_ms),
            payload: source.tags[..n]
                .iter()
                .flat_map(|tag| tag.to_le_bytes())
                .collect(),
            ..TransferOptions::default()
        };
        let from = source.set.handles_in(0..n).unwrap();
        match manager.put(pool, &from, &offer.grant, &options, self.now) {
            Ok(transfer) => self.nodes[node].puts.push(transfer),
            Err(refused) => Node::refused(&refused),
        }
    }

    fn get(&mut self, node: usize, timeout_ms: u64) {
        let Some(offer) = self.take_offer(node, Rights::Read) else {
            return;
        };
        let Some(set) = self.nodes[node].allocate(offer.tags.len() as u32) else {
            return;
        };
        let options = TransferOptions {
            timeout: Duration::from_millis(timeout_ms),
            ..TransferOptions::default()
        };
        let Node { manager, pool, .. } = &self.nodes[node];
        match manager.get(&offer.grant, pool, &set.handles(), &options, self.now) {
            Ok(transfer) => {
                let tags = offer.tags;
                self.nodes[node].gets.push(Getting {
                    transfer,
                    set,
                    tags,
                });
            }
            Err(refused) => Node::refused(&refused),
        }
    }

    /// Closes the connection. Where the transports prove nothing, bytes go on landing until the cable is cut.
    fn reconnect(&mut self, proves: bool, is_cut: bool) {
        for node in 0..2 {
            let Node { manager, peer, .. } = &self.nodes[node];
            self.fabric.can_prove(node, proves);
            let quiet = manager.disconnect(*peer, self.now).unwrap();
            self.nodes[node].offers.clear();
            assert_eq!(quiet == orchestra_memory::Quiet::Proven, proves);
        }
        if !proves {
            self.ghosts.push([self.nodes[0].peer, self.nodes[1].peer]);
        }
        if is_cut {
            self.fabric.cut();
            for peers in self.ghosts.drain(..) {
                for (node, peer) in self.nodes.iter().zip(peers) {
                    node.manager.confirm_gone(peer, self.now).unwrap();
                }
            }
        }
        self.connect();
    }

    fn progress(&mut self, at: usize) {
        let now = self.now;
        let node = &mut self.nodes[at];
        node.manager.progress(now, Duration::ZERO);
        while let Some(event) = node.manager.take_event() {
            match event {
                Event::Arrived(arrival) if arrival.rights == Rights::Write => {
                    let set = node.filling.remove(&arrival.grant).unwrap();
                    let tags = arrival.payload.chunks(8);
                    let tags = tags
                        .map(|tag| u64::from_le_bytes(tag.try_into().unwrap()))
                        .collect();
                    // What arrived is checked with all other sealed blocks.
                    set.seal().unwrap();
                    node.sealed.push(Sealed { set, tags });
                    self.seen.puts += 1;
                }
                Event::Arrived(_) => {}
                Event::Stale { .. } => self.seen.stale_arrivals += 1,
                Event::Malformed(peer) => unreachable!("{peer:?} is a manager"),
                Event::WriteGrantExpired(grant) => {
                    self.seen.expired += 1;
                    let set = node.filling.remove(&grant);
                    assert!(set.is_none_or(|set| set.handles().is_empty()));
                }
            }
        }
        for put in node.puts.extract_if(.., |put| put.result().is_some()) {
            if let Some(Err(TransferError::Timeout { quarantined: 1.. })) = put.result() {
                self.seen.timeouts_with_quarantine += 1;
            }
        }
        for get in node
            .gets
            .extract_if(.., |get| get.transfer.result().is_some())
        {
            let Getting {
                transfer,
                set,
                tags,
            } = get;
            if transfer.result().unwrap().is_ok() {
                set.seal().unwrap();
                node.sealed.push(Sealed { set, tags });
                self.seen.gets += 1;
            }
        }
        let quarantined = node.manager.stats().quarantined_blocks;
        self.seen.came_back_from_quarantine += usize::from(quarantined < node.quarantined);
        node.quarantined = quarantined;
    }

    /// Every sealed block of both nodes holds its owner's bytes, and the pools are sound.
    pub(crate) fn check(&self) {
        for node in &self.nodes {
            node.pool.check_integrity();
            for sealed in &node.sealed {
                let handles = sealed.set.handles();
                assert_eq!(
                    handles.len(),
                    sealed.tags.len(),
                    "sealed blocks are not taken away"
                );
                for (handle, tag) in handles.into_iter().zip(&sealed.tags) {
                    node.check_bytes(handle, *tag);
                }
            }
        }
    }

    /// Cuts everything and lets go of everything: every block has to come back.
    pub(crate) fn finish(mut self) -> Seen {
        self.reconnect(true, true);
        for at in 0..2 {
            self.progress(at);
        }
        self.fabric.step(1000, &mut self.draw);
        self.check();
        for node in &mut self.nodes {
            node.sealed.clear();
            node.filling.clear();
            assert!(node.puts.is_empty() && node.gets.is_empty());
            let stats = node.pool.stats();
            assert_eq!(stats.in_state(BlockState::Free), USED as usize);
            assert_eq!(
                (stats.quarantined, node.manager.stats().active_transfers),
                (0, 0)
            );
        }
        self.seen
    }
}
