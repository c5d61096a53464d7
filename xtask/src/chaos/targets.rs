//! Where the load writes and the checker looks: the servers themselves, never through a proxy that fails on purpose.

/// The servers of a stage.
#[derive(Debug, Clone)]
pub(crate) struct Targets {
    /// The orders database, as the superuser.
    pub postgres_url: String,
    /// The order API, without a path.
    pub order_api_url: String,
    /// The consumers' database, as the superuser.
    pub consumers_url: String,
    /// The aggregate type of the rows that the load writes itself; `…-events` is their topic.
    pub aggregate_type: String,
    /// Kafka's bootstrap servers, with commas.
    pub brokers: String,
    /// The topics that nobody but the relay writes to; what is committed for others is looked for there, too.
    pub topics: Vec<String>,
}
