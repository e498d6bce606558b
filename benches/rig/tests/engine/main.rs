//! The mock engine over real sockets: its answers, how it goes on with them, and every fault.

#[cfg(test)]
mod behaviour;
#[cfg(test)]
mod load;
#[cfg(test)]
mod support;
