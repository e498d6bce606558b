//! Says why a gang was refused, and how much of it would have fitted.

use super::{
    super::{error::SchedulerError, place::PlaceRequest},
    GpuPool,
    find::{Ask, Counting},
};

impl GpuPool {
    pub(super) fn refusal(&self, request: &PlaceRequest, ask: &Ask) -> SchedulerError {
        let num_gpus = request.num_gpus;
        let bytes_per_gpu = request
            .bytes_per_gpu
            .saturating_add(request.paged_bytes_per_gpu);
        let now = Counting::Below(ask.priority);
        if ask.num_stages > 1 {
            let num_stages = request.num_stages;
            let num_stages_max = self.num_stages_that_fit(ask, Counting::Everything);
            if num_stages_max < num_stages {
                return SchedulerError::PipelineTooLarge {
                    num_stages,
                    num_gpus,
                    bytes_per_gpu,
                    num_stages_max,
                };
            }
            return SchedulerError::NoStageRoom {
                num_stages,
                num_gpus,
                bytes_per_gpu,
                num_stages_max: self.num_stages_that_fit(ask, now),
            };
        }
        let num_gpus_max = self.widest(ask, Counting::Everything);
        if num_gpus_max < num_gpus {
            return SchedulerError::GangTooLarge {
                num_gpus,
                bytes_per_gpu,
                num_gpus_max,
            };
        }
        SchedulerError::NoGpuRoom {
            num_gpus,
            bytes_per_gpu,
            num_gpus_max: self.widest(ask, now),
        }
    }

    /// The most GPUs of one domain that could take part.
    fn widest(&self, ask: &Ask, counting: Counting) -> u32 {
        if ask.is_plain() {
            return self.index(ask, counting).widest(ask.total, &self.classes);
        }
        let candidates = self.candidates(ask, 1, counting);
        let widths = candidates.map(|domain| self.num_usable(domain, ask, counting));
        widths.max().unwrap_or(0) as u32
    }

    /// Stages that fit, those of all domains together.
    fn num_stages_that_fit(&self, ask: &Ask, counting: Counting) -> u32 {
        let candidates = self.candidates(ask, ask.num_gpus, counting);
        let stages = candidates.map(|domain| self.num_usable(domain, ask, counting) / ask.num_gpus);
        stages.sum::<usize>() as u32
    }
}
