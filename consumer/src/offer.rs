//! Which handlers a program offers (`--handler NAME`). The handler's type ends here: what runs it is compiled for it,
//! and chosen by its name.

use std::{fmt, pin::Pin};

use service::{Failure, shutdown::Shutdown};

use crate::{
    app::App,
    config::Settings,
    handler::{Handler, Tables},
    record::Event as _,
};

/// A handler by its name.
pub struct Offer {
    name: &'static str,
    topic: Option<&'static str>,
    traits: Traits,
    check: Check,
    run: Run,
}

/// What has to be known of a handler before there is one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Traits {
    pub(crate) tables: Tables,
    /// Its events have versions: see [`crate::Event::version`].
    pub(crate) versioned: bool,
    /// The tables that can be built anew from the topic.
    pub(crate) projection: &'static [&'static str],
    /// Statements that make the handler's own tables.
    pub(crate) schema: &'static str,
}

type Check = fn(&Settings) -> Result<(), Failure>;

type Run = Box<dyn FnOnce(App, Shutdown) -> Pin<Box<dyn Future<Output = Result<(), Failure>>>>>;

/// What a handler is made from.
#[derive(Debug)]
pub struct Setup<'a> {
    /// The consumer group.
    pub group: &'a str,
    pub(crate) settings: &'a Settings,
}

impl Offer {
    /// A handler called `name`, which is also its group unless told. `topic` is what it consumes unless told; without
    /// one the user has to tell. `make` makes it once the configuration is right.
    pub fn new<H: Handler>(
        name: &'static str,
        topic: Option<&'static str>,
        make: impl FnOnce(&Setup<'_>) -> Result<H, Failure> + 'static,
    ) -> Self {
        let traits = Traits {
            tables: H::TABLES,
            versioned: H::Event::VERSIONED,
            projection: H::PROJECTION,
            schema: H::SCHEMA,
        };
        let run: Run = Box::new(move |app, shutdown| {
            Box::pin(async move {
                let setup = Setup { group: &app.settings.kafka.group, settings: &app.settings };
                let handler = make(&setup)?;
                app.run(handler, shutdown).await
            })
        });
        Self { name, topic, traits, check: |_| Ok(()), run }
    }

    /// Of a handler with a section of its own: what is wrong with it, before anything is started.
    pub(crate) fn checked(mut self, check: Check) -> Self {
        self.check = check;
        self
    }

    /// Whether a configuration suits the handler.
    ///
    /// # Errors
    /// 64, naming the key.
    pub(crate) fn check(&self, settings: &Settings) -> Result<(), Failure> {
        (self.check)(settings)
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// What it consumes unless told; nothing for a handler that takes any topic.
    pub(crate) fn topic(&self) -> Option<&'static str> {
        self.topic
    }

    pub(crate) fn traits(&self) -> Traits {
        self.traits
    }

    /// Runs it until asked to stop.
    pub(crate) async fn run(self, app: App, shutdown: Shutdown) -> Result<(), Failure> {
        (self.run)(app, shutdown).await
    }

    /// The one that is called `name`; where there is only one it need not be named.
    ///
    /// # Errors
    /// 64, naming the choices.
    pub(crate) fn choose(mut offers: Vec<Self>, name: &str) -> Result<Self, Failure> {
        let found = match offers.as_slice() {
            [_] if name.is_empty() => Some(0),
            _ => offers.iter().position(|offer| offer.name == name),
        };
        if let Some(index) = found {
            return Ok(offers.swap_remove(index));
        }
        let found = if name.is_empty() { "is not set".into() } else { format!("is {name:?}") };
        let choices: Vec<String> = offers.iter().map(|offer| format!("--handler {}", offer.name)).collect();
        Err(Failure::configuration(format!("consumer.handler {found}"))
            .hint(format!("choose one: {}", choices.join(", "))))
    }
}

impl fmt::Debug for Offer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Offer").field("name", &self.name).field("topic", &self.topic).finish_non_exhaustive()
    }
}
