//! Messages in the database: written with their outbox rows, put there again until they are acknowledged or given up.

use sqlx::{
    Connection, QueryBuilder, Row,
    postgres::{PgConnection, PgRow},
    types::Json,
};
use uuid::Uuid;

use super::{
    New, Store, is_duplicate,
    keys::{self, Answer, Key},
};
use crate::{
    domain::{
        Acknowledgement, Headers, MAX_ACK_TIMEOUT_SECONDS, Message, MessageKey, MessageState, Payload,
        Traceparent,
    },
    error::Error,
};

const SEND: &str = concat!(include_str!("send_message.sql"), include_str!("publish_message.sql"));

const REDELIVER: &str = concat!(
    include_str!("redeliver_message.sql"),
    include_str!("next_attempt.sql"),
    include_str!("publish_message.sql")
);

const REDELIVER_DUE: &str = concat!(
    include_str!("redeliver_due.sql"),
    include_str!("next_attempt.sql"),
    include_str!("publish_message.sql")
);

/// In a CTE, because a subquery that is asked again would lock other rows.
const GIVE_UP: &str = "
WITH due AS (
    SELECT message_id FROM public.messages
    WHERE due_at <= now() AND attempt >= $1
    ORDER BY due_at LIMIT $2
    FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE public.messages SET due_at = NULL, undelivered_at = now()
FROM due WHERE messages.message_id = due.message_id";

const FIND: &str = concat!(
    include_str!("message_columns.sql"),
    ", payload::text AS payload, headers FROM public.messages WHERE message_id = $1"
);

const LIST: &str = concat!(include_str!("message_columns.sql"), "FROM public.messages WHERE true");

const EXISTS: &str = "SELECT EXISTS (SELECT FROM public.messages WHERE message_id = $1)";

/// Both from indexes that hold nothing else, and only so far.
const COUNT: &str = "
SELECT (SELECT count(*) FROM (SELECT FROM public.messages WHERE due_at IS NOT NULL LIMIT $1) AS waiting),
       (SELECT count(*) FROM (SELECT FROM public.messages WHERE undelivered_at IS NOT NULL LIMIT $1) AS undelivered)";

pub(super) const STATEMENTS: [&str; 8] = [SEND, REDELIVER, REDELIVER_DUE, GIVE_UP, FIND, LIST, EXISTS, COUNT];

/// How many messages are taken at once when their time is up.
const BATCH: i64 = 100;

/// How far messages are counted.
pub(crate) const MAX_COUNT: i64 = 10_000;

/// Which messages, the newest first; what is not given does not matter.
#[derive(Debug, Default)]
pub(crate) struct MessageFilter {
    /// In any of these states; empty: in any.
    pub(crate) states: Vec<MessageState>,
    /// Those that come after this one in the list.
    pub(crate) after: Option<Uuid>,
}

impl Store {
    /// Writes a new message; gives back the answer after the commit, or the one that was given before for the same key.
    pub(crate) async fn send(
        &self,
        message: &Message,
        traceparent: Option<&Traceparent>,
        key: Option<&Key>,
        answer: &Answer,
    ) -> Result<Answer, Error> {
        self.once(&Sending { message, outbox_id: Uuid::now_v7(), traceparent }, key, answer).await
    }

    /// The message and how far it has come.
    pub(crate) async fn message(&self, id: Uuid) -> Result<Option<Message>, Error> {
        let mut retry = self.reading();
        loop {
            match self.with_connection(async |c| find(c, id).await).await {
                Ok(message) => return Ok(message),
                Err(trouble) => retry.after(trouble)?,
            }
        }
    }

    /// At most so many messages, without what they say.
    pub(crate) async fn messages(&self, filter: &MessageFilter, most: i64) -> Result<Vec<Message>, Error> {
        let read = async |c: &mut PgConnection| -> Result<Vec<Message>, sqlx::Error> {
            let rows = list(filter, most).build().fetch_all(c).await?;
            rows.iter().map(summary).collect()
        };
        let mut retry = self.reading();
        loop {
            match self.with_connection(read).await {
                Ok(messages) => return Ok(messages),
                Err(trouble) => retry.after(trouble)?,
            }
        }
    }

    /// Puts a message in the outbox again; gives back what `answer` makes of it then, or what was answered before for
    /// the same key.
    pub(crate) async fn redeliver(
        &self,
        id: Uuid,
        key: Option<&Key>,
        answer: impl Fn(&Message) -> Result<Answer, Error> + Sync,
    ) -> Result<Answer, Error> {
        // The same for each try, so that a second one finds what the first one has done.
        let outbox_id = Uuid::now_v7();
        let mut retry = self.writing();
        loop {
            let work = async |c: &mut PgConnection| match redeliver(c, id, outbox_id, key, &answer).await {
                Ok(Ok(answer)) => Ok(Ok(answer)),
                // Perhaps because it has been done before.
                Ok(Err(error)) => Ok(keys::known(c, key).await?.unwrap_or(Err(error))),
                Err(error) if is_duplicate(&error) => match keys::known(c, key).await? {
                    Some(known) => Ok(known),
                    None => {
                        Ok(find(c, id).await?.ok_or(Error::Internal).and_then(|message| answer(&message)))
                    }
                },
                Err(error) => Err(error),
            };
            match self.with_connection(work).await {
                Ok(done) => return done,
                Err(trouble) => retry.after(trouble)?,
            }
        }
    }

    /// Puts messages whose time is up in the outbox again; gives back how many: zero if there are none, but not all.
    ///
    /// # Errors
    /// What went wrong, for the log.
    pub(crate) async fn redeliver_due(&self, max_attempts: i32) -> Result<u64, String> {
        let outbox_ids: Vec<_> = (0..BATCH).map(|_| Uuid::now_v7()).collect();
        let longest = f64::from(MAX_ACK_TIMEOUT_SECONDS);
        self.chore(sqlx::query(REDELIVER_DUE).bind(outbox_ids).bind(longest).bind(max_attempts)).await
    }

    /// Gives messages up whose time is up for the last time; gives back how many: zero if there are none, but not all.
    ///
    /// # Errors
    /// What went wrong, for the log.
    pub(crate) async fn give_up_due(&self, max_attempts: i32) -> Result<u64, String> {
        self.chore(sqlx::query(GIVE_UP).bind(max_attempts).bind(BATCH)).await
    }

    /// How many messages wait for acknowledgements and how many are undelivered, each counted as far as [`MAX_COUNT`].
    ///
    /// # Errors
    /// What went wrong, for the log.
    pub(crate) async fn count_messages(&self) -> Result<(i64, i64), String> {
        let count = async |c: &mut PgConnection| sqlx::query_as(COUNT).bind(MAX_COUNT).fetch_one(c).await;
        self.with_connection(count).await.map_err(|trouble| trouble.to_string())
    }
}

/// A message that is sent for the first time.
struct Sending<'a> {
    message: &'a Message,
    outbox_id: Uuid,
    traceparent: Option<&'a Traceparent>,
}

impl New for Sending<'_> {
    async fn insert(
        &self,
        connection: &mut PgConnection,
        key: Option<&Key>,
        answer: &Answer,
    ) -> Result<(), sqlx::Error> {
        let message = self.message;
        keys::remembering(SEND, key, answer)
            .bind(message.message_id)
            .bind(&message.topic)
            .bind(message.key.as_ref().map(MessageKey::as_str))
            .bind(message.payload.as_ref().map(Payload::as_str))
            .bind(Json(&message.headers))
            .bind(self.traceparent.map(Traceparent::as_str))
            .bind(&message.require_ack)
            .bind(message.ack_timeout)
            .bind(message.created_at)
            .bind(message.next_attempt_at)
            .bind(self.outbox_id)
            .execute(connection)
            .await
            .map(drop)
    }

    async fn is_written(&self, connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
        sqlx::query_scalar(EXISTS).bind(self.message.message_id).fetch_one(connection).await
    }
}

/// All of it in one transaction: the answer tells what the database made of the message.
async fn redeliver(
    connection: &mut PgConnection,
    id: Uuid,
    outbox_id: Uuid,
    key: Option<&Key>,
    answer: impl Fn(&Message) -> Result<Answer, Error>,
) -> Result<Result<Answer, Error>, sqlx::Error> {
    let mut transaction = connection.begin().await?;
    let again = sqlx::query(REDELIVER)
        .bind([outbox_id])
        .bind(f64::from(MAX_ACK_TIMEOUT_SECONDS))
        .bind(id)
        .execute(&mut *transaction)
        .await?;
    let answered = match find(&mut transaction, id).await? {
        None => Err(Error::NoMessage(id.to_string())),
        Some(message) if again.rows_affected() == 0 => {
            Err(message.settled().map_or(Error::Internal, Error::MessageSettled))
        }
        Some(message) => answer(&message),
    };
    match &answered {
        Ok(answer) => {
            keys::remembering(keys::REMEMBER, key, answer).execute(&mut *transaction).await?;
            transaction.commit().await?;
        }
        Err(_) => transaction.rollback().await?,
    }
    Ok(answered)
}

async fn find(connection: &mut PgConnection, id: Uuid) -> Result<Option<Message>, sqlx::Error> {
    let Some(row) = sqlx::query(FIND).bind(id).fetch_optional(connection).await? else { return Ok(None) };
    let payload = Payload::stored(row.try_get("payload")?).map_err(|e| sqlx::Error::Decode(e.into()))?;
    let Json(headers) = row.try_get::<Json<Headers>, _>("headers")?;
    Ok(Some(Message { payload: Some(payload), headers: Some(headers), ..summary(&row)? }))
}

fn list(filter: &MessageFilter, most: i64) -> QueryBuilder<sqlx::Postgres> {
    let mut query = QueryBuilder::new(LIST);
    for (index, state) in filter.states.iter().enumerate() {
        query.push(if index == 0 { " AND (" } else { " OR " }).push(condition(*state));
    }
    if !filter.states.is_empty() {
        query.push(")");
    }
    if let Some(after) = filter.after {
        query.push(" AND message_id < ").push_bind(after);
    }
    // The ids are in the order of time.
    query.push(" ORDER BY message_id DESC LIMIT ").push_bind(most);
    query
}

/// What [`Message::with`] sees, for the indexes.
fn condition(state: MessageState) -> &'static str {
    match state {
        MessageState::Committed => {
            "acknowledged_at IS NULL AND undelivered_at IS NULL AND NOT EXISTS (
                SELECT FROM public.message_acks AS ack WHERE ack.message_id = messages.message_id)"
        }
        // Whoever has one acknowledgement and waits for more is due some time.
        MessageState::Published => {
            "due_at IS NOT NULL AND EXISTS (
                SELECT FROM public.message_acks AS ack WHERE ack.message_id = messages.message_id)"
        }
        MessageState::Acknowledged => "acknowledged_at IS NOT NULL",
        MessageState::Undelivered => "undelivered_at IS NOT NULL",
    }
}

/// A message without what it says.
fn summary(row: &PgRow) -> Result<Message, sqlx::Error> {
    let key: Option<String> = row.try_get("key")?;
    let Json(acks) = row.try_get::<Json<Vec<Acknowledgement>>, _>("acks")?;
    let message = Message {
        message_id: row.try_get("message_id")?,
        state: MessageState::Committed,
        topic: row.try_get("topic")?,
        key: key.map(MessageKey::parse).transpose().map_err(|what| sqlx::Error::Decode(what.into()))?,
        payload: None,
        headers: None,
        require_ack: row.try_get("require_ack")?,
        ack_timeout: row.try_get("ack_timeout_seconds")?,
        attempt: row.try_get("attempt")?,
        redeliveries: 0,
        created_at: row.try_get("created_at")?,
        next_attempt_at: row.try_get("due_at")?,
        acknowledged_at: row.try_get("acknowledged_at")?,
        undelivered_at: row.try_get("undelivered_at")?,
        lsn: None,
        acknowledgements: Vec::new(),
    };
    Ok(message.with(&acks))
}
