//! What GPUs share: cores, memory and network of their node, power of their domain.
//!
//! A limit of 0 is none. Requests that name no shares never come here, so they cost what they did.
//!
//! Those that do go where least free memory becomes useless: a domain's free memory is useless as far as it exceeds what
//! its scarcest share would suffice for if all requests were the mean of those placed so far. It is the idea of FGD
//! (Weng et al., ATC'23: go where fragmentation grows least) with the mean in place of every class of requests, and it
//! takes O(G) for a domain instead of O(classes · G).

use super::{
    super::{
        error::SchedulerError,
        place::{NodeLimits, Shares},
    },
    GpuPool,
    find::{Ask, Counting},
};

/// A limit, and how much of it placements hold.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Quota {
    pub(super) limit: u64,
    /// Wide enough that no sum of shares overflows.
    pub(super) held: u128,
}

/// A node: its GPUs share its cores, memory and network.
#[derive(Clone, Debug, Default)]
pub(super) struct Node {
    pub(super) name: String,
    /// Its registered GPUs.
    pub(super) num_gpus: u32,
    /// In the order of [`Shares::of_node`].
    pub(super) quotas: [Quota; 3],
}

impl Quota {
    /// How many takers of `share` each there is room for.
    fn num_takers(self, share: u64, counting: Counting) -> u64 {
        if self.limit == 0 || share == 0 {
            return u64::MAX;
        }
        let held = match counting {
            Counting::Below(_) => u64::try_from(self.held).unwrap_or(u64::MAX),
            Counting::Everything => 0,
        };
        self.limit.saturating_sub(held) / share
    }
}

impl Quota {
    fn left(self) -> Option<u128> {
        let limit = u128::from(self.limit);
        (limit > 0).then(|| limit.saturating_sub(self.held))
    }
}

/// What the requests with shares took together: how much of each kind goes with an extent of memory.
#[derive(Debug, Default)]
pub(super) struct ShareMix {
    extents: u128,
    shares: [u128; 4],
}

impl ShareMix {
    /// Counts a request: the extents and the shares of one of its GPUs.
    pub(super) fn add(&mut self, extents: u64, shares: &Shares) {
        self.extents += u128::from(extents);
        for (sum, share) in self.shares.iter_mut().zip(shares.all()) {
            *sum += u128::from(share);
        }
    }

    /// Free extents beyond those that the scarcest kind suffices for, `takers` gone from what is left.
    fn useless(&self, free: u128, left: &[Option<u128>; 4], takers: u128, shares: &Shares) -> i128 {
        let kinds = left.iter().zip(shares.all()).zip(self.shares);
        let usable = kinds.filter_map(|((left, share), asked)| {
            let left = (*left)?.saturating_sub(takers * u128::from(share));
            left.saturating_mul(self.extents).checked_div(asked)
        });
        free.saturating_sub(usable.min().unwrap_or(free)) as i128
    }
}

impl Node {
    pub(super) fn is_limited(&self) -> bool {
        self.quotas.iter().any(|quota| quota.limit > 0)
    }
}

impl Shares {
    pub(super) fn is_none(&self) -> bool {
        *self == Self::default()
    }

    fn all(&self) -> [u64; 4] {
        let [cores, memory, network] = self.of_node();
        [cores, memory, network, self.power_watts]
    }

    pub(super) fn of_node(&self) -> [u64; 3] {
        [self.cpu_milli, self.host_memory_bytes, self.nic_mbps]
    }
}

/// How many more GPUs of one domain can have their shares: counted down while a gang is put together.
pub(super) struct Budget<'a> {
    shares: &'a Shares,
    counting: Counting,
    /// Of the domain.
    left: u64,
    /// By node slot, those that were asked about.
    nodes: Vec<(u32, u64)>,
}

impl Budget<'_> {
    /// Takes one GPU's shares; `false` where there are none left.
    pub(super) fn take(&mut self, pool: &GpuPool, gpu: u32) -> bool {
        let Some(gpu) = pool.gpus[gpu as usize].as_ref() else {
            return false;
        };
        let node = gpu.node;
        let known = self.nodes.iter().position(|&(slot, _)| slot == node);
        let at = known.unwrap_or_else(|| {
            let takers = pool.node_takers(node, self.shares, self.counting);
            self.nodes.push((node, takers));
            self.nodes.len() - 1
        });
        let left = &mut self.nodes[at].1;
        if *left == 0 || self.left == 0 {
            return false;
        }
        *left -= 1;
        self.left -= 1;
        true
    }
}

impl GpuPool {
    /// Whether the node has no limits, or has its GPUs in this domain alone. With limits that span domains, the GPUs
    /// that fit could no longer be counted domain by domain.
    pub(super) fn may_join_node(&self, node: &str, domain: &str) -> bool {
        let Some(&slot) = self.node_names.get(node) else {
            return true;
        };
        let is_limited = self.nodes[slot as usize]
            .as_ref()
            .is_some_and(Node::is_limited);
        let mut gpus = self.gpus.iter().flatten().filter(|gpu| gpu.node == slot);
        !is_limited || gpus.all(|gpu| gpu.spec.domain == domain)
    }

    /// Counts a GPU of the node, new or not; answers the node's slot.
    pub(super) fn join_node(&mut self, name: &str) -> u32 {
        let slot = self.node_names.get(name).copied().unwrap_or_else(|| {
            let slot = self.free_node_slots.pop_first().unwrap_or_else(|| {
                self.nodes.push(None);
                self.nodes.len() as u32 - 1
            });
            self.node_names.insert(name.to_owned(), slot);
            slot
        });
        let node = self.nodes[slot as usize].get_or_insert_with(|| Node {
            name: name.to_owned(),
            ..Node::default()
        });
        node.num_gpus += 1;
        slot
    }

    /// Counts a GPU of the node less; the last one takes the node's limits with it.
    pub(super) fn leave_node(&mut self, slot: u32) {
        let Some(node) = self.nodes[slot as usize].as_mut() else {
            return;
        };
        node.num_gpus -= 1;
        if node.num_gpus == 0 {
            self.node_names.remove(&node.name);
            self.nodes[slot as usize] = None;
            self.free_node_slots.insert(slot);
        }
    }

    /// How many of the domain's GPUs could have these shares.
    pub(super) fn budget<'a>(
        &self,
        domain: u32,
        shares: &'a Shares,
        counting: Counting,
    ) -> Budget<'a> {
        let power = self.domains[domain as usize]
            .as_ref()
            .map(|domain| domain.power);
        let left = power.map_or(0, |power| power.num_takers(shares.power_watts, counting));
        Budget {
            shares,
            counting,
            left,
            nodes: Vec::new(),
        }
    }

    fn node_takers(&self, node: u32, shares: &Shares, counting: Counting) -> u64 {
        let Some(node) = self.nodes[node as usize].as_ref() else {
            return 0;
        };
        let takers = node.quotas.iter().zip(shares.of_node());
        let takers = takers.map(|(quota, share)| quota.num_takers(share, counting));
        takers.min().unwrap_or(u64::MAX)
    }

    /// By how many extents a gang in this domain makes more of its free memory useless, for want of shares.
    pub(super) fn stranding(&self, domain: u32, ask: &Ask) -> i128 {
        let free = self
            .rooms(domain, Counting::Below(0))
            .map(|(_, total)| u128::from(total));
        let free: u128 = free.sum();
        let num_gpus = (ask.num_gpus * ask.num_stages) as u128;
        let left = self.shares_left(domain);
        let before = self.mix.useless(free, &left, 0, &ask.shares);
        let free = free.saturating_sub(num_gpus * u128::from(ask.total));
        self.mix.useless(free, &left, num_gpus, &ask.shares) - before
    }

    /// What is left of each kind in the domain; `None` where one is not limited.
    fn shares_left(&self, domain: u32) -> [Option<u128>; 4] {
        let mut left = [Some(0_u128); 4];
        let Some(domain) = self.domains[domain as usize].as_ref() else {
            return left;
        };
        let mut nodes: Vec<u32> = Vec::with_capacity(4);
        for &gpu in domain.members.iter().flatten() {
            let node = self.gpus[gpu as usize].as_ref().map(|gpu| gpu.node);
            if node.is_some_and(|node| !nodes.contains(&node)) {
                nodes.extend(node);
            }
        }
        for node in nodes {
            let Some(node) = self.nodes[node as usize].as_ref() else {
                continue;
            };
            for (left, quota) in left.iter_mut().zip(node.quotas) {
                *left = left.zip(quota.left()).map(|(sum, left)| sum + left);
            }
        }
        left[3] = domain.power.left();
        left
    }

    /// Books one GPU's shares, or gives them back.
    pub(super) fn book_shares(&mut self, gpu: u32, shares: &Shares, is_taken: bool) {
        if shares.is_none() {
            return;
        }
        let Some(gpu) = self.gpus[gpu as usize].as_ref() else {
            return;
        };
        let book = |quota: &mut Quota, share: u64| {
            if is_taken {
                quota.held += u128::from(share);
            } else {
                quota.held -= u128::from(share);
            }
        };
        if let Some(node) = self.nodes[gpu.node as usize].as_mut() {
            let quotas = node.quotas.iter_mut().zip(shares.of_node());
            quotas.for_each(|(quota, share)| book(quota, share));
        }
        if let Some(domain) = self.domains[gpu.domain as usize].as_mut() {
            book(&mut domain.power, shares.power_watts);
        }
    }

    /// Sets what the GPUs of a node share.
    pub(in super::super) fn set_node_limits(
        &mut self,
        name: &str,
        limits: &NodeLimits,
    ) -> Result<(), SchedulerError> {
        let invalid = |expected| {
            let field = "node";
            Err(SchedulerError::InvalidField { field, expected })
        };
        let Some(&slot) = self.node_names.get(name) else {
            return invalid("that of a registered GPU");
        };
        let mut domains = self.gpus.iter().flatten();
        let mut domains = domains
            .by_ref()
            .filter(|gpu| gpu.node == slot)
            .map(|gpu| gpu.domain);
        let first = domains.next();
        if domains.any(|domain| Some(domain) != first) {
            return invalid("one whose GPUs are all of one domain");
        }
        if let Some(node) = self.nodes[slot as usize].as_mut() {
            let NodeLimits {
                cpu_milli,
                host_memory_bytes,
                nic_mbps,
            } = *limits;
            let limits = [cpu_milli, host_memory_bytes, nic_mbps];
            for (quota, limit) in node.quotas.iter_mut().zip(limits) {
                quota.limit = limit;
            }
        }
        Ok(())
    }

    /// Sets the power that the GPUs of a domain share. `false` where no GPU is of this domain.
    pub(in super::super) fn set_domain_power(&mut self, name: &str, watts: u64) -> bool {
        let slot = self.domain_names.get(name).copied();
        let domain = slot.and_then(|slot| self.domains[slot as usize].as_mut());
        let is_known = domain.is_some();
        if let Some(domain) = domain {
            domain.power.limit = watts;
        }
        is_known
    }
}
