//! `postgres/init.sql`: again and again, at once, and what each role may do.

use sqlx::{AssertSqlSafe, Connection, PgConnection};

use crate::stage::{INIT, LOCAL, Stage, order, run, try_run};

#[test]
fn applying_it_again_keeps_the_data_and_mends_what_was_changed() {
    let stage = Stage::new();
    let service = stage.service();
    service.post(&order());
    stage.sql(
        "GRANT DELETE ON outbox TO order_api; GRANT SELECT ON orders TO PUBLIC;
         ALTER PUBLICATION cdc_relay SET (publish = 'insert, delete');
         ALTER PUBLICATION cdc_relay SET TABLE orders; ALTER ROLE order_api CREATEDB",
    );
    stage.apply_schema();
    assert_eq!(stage.counts(), [1, 2, 1, 1]);
    assert_eq!(stage.value("SELECT has_table_privilege('order_api', 'outbox', 'DELETE')"), "false");
    assert_eq!(stage.value("SELECT has_table_privilege('cdc_relay', 'orders', 'SELECT')"), "false");
    assert_eq!(stage.value("SELECT rolcreatedb FROM pg_roles WHERE rolname = 'order_api'"), "false");
    let publication = "SELECT pubinsert AND NOT (pubupdate OR pubdelete OR pubtruncate OR puballtables) \
                       AND pubowner = 'orders_owner'::regrole \
                       AND EXISTS (SELECT FROM pg_publication_tables t WHERE t.pubname = p.pubname AND tablename = 'outbox') \
                       FROM pg_publication p WHERE pubname = 'cdc_relay'";
    assert_eq!(stage.value(publication), "true");
    assert_eq!(service.post(&order()).status, 201);
}

#[test]
fn applying_it_does_not_wait_for_writers() {
    let stage = Stage::new();
    let options = stage.role("order_api");
    stage.runtime.block_on(async {
        let mut writer = PgConnection::connect_with(&options).await.unwrap();
        let mut transaction = writer.begin().await.unwrap();
        sqlx::query("INSERT INTO outbox (id, aggregatetype, aggregateid, type) VALUES (gen_random_uuid(), 'order', 'x', 'T')")
            .execute(&mut *transaction)
            .await
            .unwrap();
        // With a lock on the writer's table this would wait for its end, and fail after the lock timeout.
        let again = INIT.replace("'60s'", "'1s'");
        assert_ne!(again, INIT);
        run(&stage.superuser(), again).await;
        transaction.commit().await.unwrap();
    });
}

#[test]
fn applying_it_eight_times_at_once_to_two_databases_works() {
    let stages = [Stage::empty(), Stage::empty()];
    stages[0].runtime.block_on(async {
        let mut tasks = tokio::task::JoinSet::new();
        for n in 0..8 {
            let options = stages[n % 2].superuser();
            tasks.spawn(async move {
                run(&options, INIT.into()).await;
                run(&options, LOCAL.into()).await;
            });
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
    });
    for stage in &stages {
        assert_eq!(stage.counts(), [0; 4]);
    }
}

#[test]
fn every_role_may_do_its_work_and_nothing_else() {
    let stage = Stage::new();
    stage.service().post(&order());
    let order_api = [
        "DROP TABLE outbox",
        "ALTER TABLE orders ADD COLUMN x int",
        "TRUNCATE orders",
        "DELETE FROM outbox",
        "UPDATE outbox SET type = 'x'",
        "SELECT * FROM outbox",
        "UPDATE order_events SET version = 2",
        "DELETE FROM order_events",
        "DELETE FROM orders",
        "CREATE TABLE x ()",
        "CREATE TEMPORARY TABLE x ()",
        "CREATE SCHEMA x",
        "CREATE ROLE x",
        "CREATE PUBLICATION x",
        "DROP PUBLICATION cdc_relay",
        "SET ROLE orders_owner",
        "SELECT pg_read_file('/etc/hostname')",
        "SELECT pg_create_physical_replication_slot('x')",
    ];
    let cdc_relay = [
        "SELECT * FROM orders",
        "INSERT INTO outbox (id, aggregatetype, aggregateid, type) VALUES (gen_random_uuid(), 'a', 'b', 'c')",
        "DELETE FROM outbox",
        "DROP PUBLICATION cdc_relay",
        "CREATE TABLE x ()",
        "SET ROLE order_api",
    ];
    stage.runtime.block_on(async {
        for (role, statements) in [("order_api", &order_api[..]), ("cdc_relay", &cdc_relay)] {
            for statement in statements {
                let refused = try_run(&stage.role(role), (*statement).to_owned()).await.expect_err(statement);
                let code = refused
                    .as_database_error()
                    .and_then(sqlx::error::DatabaseError::code)
                    .unwrap_or_default()
                    .to_string();
                assert_eq!(code, "42501", "{role}: {statement}: {refused}");
            }
        }
        run(&stage.role("cdc_relay"), "SELECT * FROM outbox".into()).await;
        // Another role of the cluster may not even connect.
        let stranger = try_run(&stage.role("consumer"), "SELECT 1".into()).await.unwrap_err();
        assert!(stranger.to_string().contains("permission denied for database"), "{stranger}");
    });
    assert_eq!(stage.counts(), [1, 2, 1, 1]);
}

#[test]
fn the_tables_belong_to_the_owner_and_keep_their_rules() {
    let stage = Stage::new();
    let owned = "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' \
                 AND relowner = 'orders_owner'::regrole";
    assert_eq!(stage.value(owned), "11");
    let insert = "INSERT INTO orders VALUES ('o', 'c', 'r', 'created', 1, 'EUR', 1, now(), now())";
    stage.sql(insert);
    stage.runtime.block_on(async {
        let mut owner = PgConnection::connect_with(&stage.role("orders_owner")).await.unwrap();
        for (wrong, code) in [
            (insert.to_owned(), "23505"),
            (insert.replace("'o'", "''"), "23514"),
            (insert.replace("'o'", "'p'").replace("created", "lost"), "23514"),
            (insert.replace("'o'", "'p'").replace("EUR", "eur"), "23514"),
            (insert.replace("'o'", "'p'").replace("1, now", "-1, now"), "23514"),
            ("INSERT INTO order_items VALUES ('none', 1, 'm', 'n', 1, 1)".into(), "23503"),
            ("INSERT INTO order_items VALUES ('o', 1, 'm', 'n', 1, 0)".into(), "23514"),
        ] {
            let refused = sqlx::raw_sql(AssertSqlSafe(wrong)).execute(&mut owner).await.unwrap_err();
            assert_eq!(refused.as_database_error().unwrap().code().unwrap(), code, "{refused}");
        }
    });
}
