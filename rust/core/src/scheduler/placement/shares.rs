//! What GPUs share: cores, memory and network of their node, power of their domain.
//!
//! A limit of 0 is none. Requests that name no shares never come here, so they cost what they did.

use super::{
    super::{
        error::SchedulerError,
        place::{NodeLimits, Shares},
    },
    GpuPool,
    find::Counting,
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

impl Node {
    pub(super) fn is_limited(&self) -> bool {
        self.quotas.iter().any(|quota| quota.limit > 0)
    }
}

impl Shares {
    pub(super) fn is_none(&self) -> bool {
        *self == Self::default()
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
