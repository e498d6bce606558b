//! Which GPUs and domains there are, and which of them may be used.

use super::{
    super::{
        error::SchedulerError,
        place::{GpuId, GpuSpec, PlacementId},
        worker::validate_name,
    },
    GpuPool,
    memory::{GpuMemory, Rooms},
    shares::Quota,
};

/// The most GPUs that a domain may have: counts are bytes and choices of a gang live on the stack.
pub(super) const DOMAIN_GPUS_MAX: usize = 128;

#[derive(Clone, Debug)]
pub(super) struct Gpu {
    pub(super) id: GpuId,
    /// Apart, so that GPUs lie close in memory.
    pub(super) spec: Box<GpuSpec>,
    pub(super) domain: u32,
    pub(super) node: u32,
    /// Its place in the domain.
    pub(super) member: u32,
    pub(super) is_failed: bool,
    /// Whether its domain drains.
    pub(super) is_draining: bool,
    pub(super) memory: GpuMemory,
    /// What the index says of it.
    pub(super) indexed: Rooms,
}

#[derive(Clone, Debug)]
pub(super) struct Domain {
    pub(super) name: String,
    /// All its GPUs name the same.
    pub(super) rack: Option<String>,
    pub(super) power: Quota,
    pub(super) is_draining: bool,
    /// GPU slots by member; `None` where one was removed.
    pub(super) members: Vec<Option<u32>>,
}

impl Gpu {
    pub(super) fn is_usable(&self) -> bool {
        !self.is_failed && !self.is_draining
    }
}

impl GpuPool {
    pub(in super::super) fn add(&mut self, spec: GpuSpec) -> Result<GpuId, SchedulerError> {
        let capacity = self.check_spec(&spec)?;
        self.num_registered += 1;
        let id = GpuId(self.num_registered);
        let slot = self.free_gpu_slots.pop_first().unwrap_or_else(|| {
            self.gpus.push(None);
            self.gpus.len() as u32 - 1
        });
        let domain = self.domain_slot(&spec.domain);
        let node = self.join_node(&spec.node);
        let members = self.domains[domain as usize].get_or_insert_with(|| Domain {
            name: spec.domain.clone(),
            rack: spec.rack.clone(),
            power: Quota::default(),
            is_draining: false,
            members: Vec::new(),
        });
        let member = first_free(&mut members.members);
        members.members[member] = Some(slot);
        let is_draining = members.is_draining;
        self.gpu_ids.insert(id, slot);
        self.gpu_names.insert(spec.name.clone(), id);
        self.gpus[slot as usize] = Some(Gpu {
            id,
            spec: Box::new(spec),
            domain,
            node,
            member: member as u32,
            is_failed: false,
            is_draining,
            memory: GpuMemory::new(capacity),
            indexed: Rooms::default(),
        });
        self.grow_index(member + 1, capacity);
        self.member_slots[domain as usize * self.index_shape.num_slots + member] = slot;
        self.by_capacity
            .set(domain, member, capacity, &self.classes);
        self.refresh(slot);
        Ok(id)
    }

    /// The GPU's memory in extents, where it may be added.
    fn check_spec(&self, spec: &GpuSpec) -> Result<u32, SchedulerError> {
        let invalid = |field, expected| Err(SchedulerError::InvalidField { field, expected });
        validate_name("name", &spec.name)?;
        validate_name("domain", &spec.domain)?;
        validate_name("node", &spec.node)?;
        if let Some(rack) = &spec.rack {
            validate_name("rack", rack)?;
        }
        let Ok(capacity) = u32::try_from(spec.memory_bytes / self.extent_bytes) else {
            return invalid("memory_bytes", "less than 2^32 extents");
        };
        if capacity == 0 {
            return invalid("memory_bytes", "at least one extent");
        }
        if self.gpu_names.contains_key(&spec.name) {
            return Err(SchedulerError::DuplicateName { kind: "gpu" });
        }
        if let Some(domain) = self.domain(&spec.domain) {
            if domain.members.iter().flatten().count() >= DOMAIN_GPUS_MAX {
                return invalid("domain", "one with fewer than 128 GPUs");
            }
            if domain.rack != spec.rack {
                return invalid("rack", "that of the domain's other GPUs");
            }
        }
        if !self.may_join_node(&spec.node, &spec.domain) {
            return invalid("node", "one without limits, or of this domain");
        }
        let limit = self.max_num_gpus;
        if self.gpu_ids.len() >= limit as usize {
            return Err(SchedulerError::LimitReached {
                kind: "gpus",
                current: limit,
                limit,
            });
        }
        Ok(capacity)
    }

    /// The slot of the domain, new or not.
    fn domain_slot(&mut self, name: &str) -> u32 {
        if let Some(&slot) = self.domain_names.get(name) {
            return slot;
        }
        let slot = self.free_domain_slots.pop_first().unwrap_or_else(|| {
            self.domains.push(None);
            self.domains.len() as u32 - 1
        });
        self.domain_names.insert(name.to_owned(), slot);
        slot
    }

    /// Makes room in the index for all domains, `num_slots` GPUs in one, and room of `capacity` units.
    fn grow_index(&mut self, num_slots: usize, capacity: u32) {
        let old = self.index_shape;
        let num_domains = self.domains.len();
        let mut shape = old;
        if num_domains > old.num_domains {
            shape.num_domains = num_domains.next_power_of_two().max(64);
        }
        if num_slots > old.num_slots {
            // Exactly, above 8: rounding 72 to 128 would cost memory and time for good.
            shape.num_slots =
                num_slots.max((old.num_slots + old.num_slots / 8).min(DOMAIN_GPUS_MAX));
        }
        shape.num_classes = old.num_classes.max(self.classes.num_held(capacity));
        if shape == old {
            return;
        }
        self.index_shape = shape;
        self.member_slots = vec![0; shape.num_domains * shape.num_slots];
        for (slot, gpu) in self.gpus.iter().enumerate() {
            if let Some(gpu) = gpu {
                let cell = gpu.domain as usize * shape.num_slots + gpu.member as usize;
                self.member_slots[cell] = slot as u32;
            }
        }
        for index in self.by_run.iter_mut().chain(&mut self.by_total) {
            index.reshape(shape, &self.classes);
        }
        self.by_capacity.reshape(shape, &self.classes);
    }

    /// Forgets a GPU and releases what was placed on it.
    pub(in super::super) fn remove(&mut self, id: GpuId) -> Option<Vec<PlacementId>> {
        let slot = *self.gpu_ids.get(&id)?;
        let lost = self.evict(slot);
        self.set_failed(slot, true);
        let gpu = self.gpus[slot as usize].take()?;
        self.by_capacity
            .set(gpu.domain, gpu.member as usize, 0, &self.classes);
        self.gpu_ids.remove(&id);
        self.gpu_names.remove(&gpu.spec.name);
        self.free_gpu_slots.insert(slot);
        self.leave_node(gpu.node);
        if let Some(domain) = self.domains[gpu.domain as usize].as_mut() {
            domain.members[gpu.member as usize] = None;
            if domain.members.iter().all(Option::is_none) {
                self.domain_names.remove(&gpu.spec.domain);
                self.domains[gpu.domain as usize] = None;
                self.free_domain_slots.insert(gpu.domain);
            }
        }
        Some(lost)
    }

    /// Takes a GPU out of use and releases what was placed on it. `None` where it is not registered.
    pub(in super::super) fn fail(&mut self, id: GpuId) -> Option<Vec<PlacementId>> {
        let slot = *self.gpu_ids.get(&id)?;
        let lost = self.evict(slot);
        self.set_failed(slot, true);
        Some(lost)
    }

    /// Puts a failed GPU back into use, empty. `false` where it is not registered.
    pub(in super::super) fn restore(&mut self, id: GpuId) -> bool {
        let Some(&slot) = self.gpu_ids.get(&id) else {
            return false;
        };
        self.set_failed(slot, false);
        true
    }

    fn set_failed(&mut self, slot: u32, is_failed: bool) {
        if let Some(gpu) = self.gpus[slot as usize].as_mut() {
            gpu.is_failed = is_failed;
        }
        self.refresh(slot);
    }

    /// Releases every placement with memory on the GPU; ascending.
    fn evict(&mut self, slot: u32) -> Vec<PlacementId> {
        let lost = self.placed_on([slot]);
        for &placement in &lost {
            self.release(placement);
        }
        lost
    }

    /// Every placement with memory on these GPUs; ascending.
    fn placed_on(&self, slots: impl IntoIterator<Item = u32>) -> Vec<PlacementId> {
        let memories = slots.into_iter().filter_map(|slot| self.memory(slot));
        let pieces = memories.flat_map(GpuMemory::pieces);
        let mut placed: Vec<PlacementId> = pieces.map(|piece| piece.placement).collect();
        placed.sort_unstable();
        placed.dedup();
        placed
    }

    /// Stops or resumes placing in the domain; answers what is still placed there, ascending.
    pub(in super::super) fn set_draining(
        &mut self,
        name: &str,
        is_draining: bool,
    ) -> Option<Vec<PlacementId>> {
        let index = *self.domain_names.get(name)?;
        let domain = self.domains[index as usize].as_mut()?;
        domain.is_draining = is_draining;
        let members: Vec<u32> = domain.members.iter().flatten().copied().collect();
        for &slot in &members {
            if let Some(gpu) = self.gpus[slot as usize].as_mut() {
                gpu.is_draining = is_draining;
            }
            self.refresh(slot);
        }
        Some(self.placed_on(members))
    }

    pub(super) fn domain(&self, name: &str) -> Option<&Domain> {
        let slot = *self.domain_names.get(name)?;
        self.domains[slot as usize].as_ref()
    }

    pub(super) fn gpu(&self, id: GpuId) -> Option<&Gpu> {
        let slot = *self.gpu_ids.get(&id)?;
        self.gpus[slot as usize].as_ref()
    }

    pub(in super::super) fn by_name(&self, name: &str) -> Option<GpuId> {
        self.gpu_names.get(name).copied()
    }

    pub(in super::super) fn spec(&self, id: GpuId) -> Option<&GpuSpec> {
        self.gpu(id).map(|gpu| &*gpu.spec)
    }
}

/// The first unused member, added where all are used.
fn first_free(members: &mut Vec<Option<u32>>) -> usize {
    let free = members.iter().position(Option::is_none);
    free.unwrap_or_else(|| {
        members.push(None);
        members.len() - 1
    })
}
