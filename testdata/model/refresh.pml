/*
 * Refresh tokens as a model: one session, clients that present any token that
 * was ever handed out (so one of them may be a thief), a revocation, a clock, a
 * standby that lags and is promoted, answers that are lost and replicas that
 * die. It is searched in full by check.sh.
 *
 * Modelled: the decision list of rotateSQL in db/session.go, WHEN by WHEN, on a
 * row of the columns it reads: generation, step_hash, prev_step_hash,
 * step_seed, revoked_at, expires_at against the clock, used_at + grace against
 * the clock, the limit. A client's request is under way before and after that
 * one step, so that everything else may happen in between.
 *
 * Not modelled: secrets (a token is a number, and nobody guesses one), tokens
 * without the family secret (the WHERE keeps them from the row), password
 * changes, the times themselves (the clock may pass a moment at any step), the
 * length of the limit's minute (it may apply to any request), PostgreSQL (an
 * UPDATE of one row is one step, and what was answered is on disk: a crash
 * before that is a request that never came, a crash after it a lost answer).
 *
 * The claims are the contract's sentences. They compare what the row decided
 * with a history of its own (h_...), which the guards never read:
 *
 *   1  of N refreshes with one token exactly one rotates
 *   2  a spent token, however old, revokes the session
 *   3  within the grace the token spent last, before its successor was used,
 *      gives the same successor, and nothing else does
 *   4  a session that was ended, or that is over, is never rescued
 *   5  once a revocation has been answered no refresh is decided ok
 *   6  decision and act are one step: the row is the one that was read
 *   7  after a promotion a token newer than the row is refused without
 *      revoking, and no token of the lost history is ever good
 *
 * Defines: CLIENTS, TOKENS (how many a search may issue), GRACE, REVOKE,
 * LIMIT, FAULTS, PROMOTE (0 or 1); ONLY checks one claim; NEVER=outcome claims
 * that an outcome does not occur; BROKEN_... is a row that breaks a claim.
 */

#ifndef CLIENTS
#define CLIENTS 2
#endif
#ifndef TOKENS
#define TOKENS 5
#endif
#ifndef GRACE
#define GRACE 0
#endif
#ifndef REVOKE
#define REVOKE 0
#endif
#ifndef LIMIT
#define LIMIT 0
#endif
#ifndef FAULTS
#define FAULTS 0
#endif
#ifndef PROMOTE
#define PROMOTE 0
#endif
#ifndef ONLY
#define ONLY 0
#endif
#ifndef NEVER
#define NEVER none
#endif

#define NO 15 /* no token */
#define claim(n, sentence) assert((ONLY != 0 && ONLY != n) || (sentence))

mtype = { none, ahead, revoked, expired, limited, rotated, replay_again, reused, replay };

/* The row. A token is its number; the row knows it by that (step_hash) and by
   its generation. The successor of prev_step under step_seed is step: with a
   seed it can be made again from prev_step. */
unsigned generation : 3;
unsigned step : 4;
unsigned prev_step : 4 = NO;
bool step_seed, revoked_at;
bool over;   /* expires_at <= clock */
bool window; /* clock < used_at + grace */

/* The standby's copy of the row and, so that the claims speak of the history
   that survives, of the history at that moment. */
unsigned s_generation : 3;
unsigned s_step : 4;
unsigned s_prev_step : 4 = NO;
bool s_step_seed, s_revoked_at, s_over, s_window;
unsigned s_issued : 4 = 1;
unsigned sh_spent : 8;
unsigned sh_current : 4;
unsigned sh_last : 4 = NO;
bool sh_ended;

/* Tokens. */
unsigned issued : 4 = 1; /* numbers below are taken */
byte of_generation[TOKENS];
unsigned delivered : 8 = 1; /* a bit each: some client has it */

/* History. */
unsigned h_spent : 8;    /* a bit each: rotated */
unsigned h_current : 4;  /* issued last */
unsigned h_last : 4 = NO; /* its predecessor */
bool h_ended;            /* revoked, by whomever */
bool h_answered;         /* a revocation was answered */
unsigned h_lost : 8;     /* a bit each: issued in the history that was lost */

#define has(set, token) ((set >> token) & 1)
#define ok(o) (o == rotated || o == reused)
#define graceful(token) (GRACE && h_last == token && window)
#define live (!h_ended && !over)

inline give(token) { delivered = delivered | (1 << token) }

/* Any token that was handed out. */
inline pick(token) {
	if
	:: has(delivered, 0) -> token = 0
	:: has(delivered, 1) -> token = 1
	:: has(delivered, 2) -> token = 2
	:: TOKENS > 3 && has(delivered, 3) -> token = 3
	:: TOKENS > 4 && has(delivered, 4) -> token = 4
	:: TOKENS > 5 && has(delivered, 5) -> token = 5
	fi
}

/* What the conditions of rotateSQL call current and in_grace. */
#ifdef BROKEN_GENERATION_IS_ENOUGH
#define current (generation == of_generation[token])
#else
#ifdef BROKEN_SPENT_LAST_IS_CURRENT
#define current (step == token || prev_step == token)
#else
#define current (generation == of_generation[token] && step == token)
#endif
#endif

#ifdef BROKEN_GRACE_WITHOUT_CLOCK
#define in_grace (generation == of_generation[token] + 1 && prev_step == token && step_seed && !over)
#else
#ifdef BROKEN_GRACE_OF_ANY_SPENT
#define in_grace (generation > of_generation[token] && step_seed && window && !over)
#else
#ifdef BROKEN_GRACE_OUTLIVES_SESSION
#define in_grace (generation == of_generation[token] + 1 && prev_step == token && step_seed && window)
#else
#define in_grace (generation == of_generation[token] + 1 && prev_step == token && step_seed && window && !over)
#endif
#endif
#endif

/* The list of WHENs, in order. */
inline decide(token) {
	if
#ifndef BROKEN_AHEAD_IS_REPLAY
	:: generation < of_generation[token] -> outcome = ahead
	:: else -> if
#else
	:: true -> if
#endif
#ifndef BROKEN_REVOKED_ROTATES
	:: current && revoked_at -> outcome = revoked
	:: else -> if
#else
	:: true -> if
#endif
#ifndef BROKEN_OVER_ROTATES
	:: current && over -> outcome = expired
	:: else -> if
#else
	:: true -> if
#endif
	:: current && limit_spent -> outcome = limited
	:: else -> if
	:: current -> outcome = rotated
	:: else -> if
#ifdef BROKEN_GRACE_BEFORE_REVOKED
	:: in_grace -> outcome = reused
	:: else -> if
#else
	:: false
	:: else -> if
#endif
	:: revoked_at -> outcome = replay_again
	:: else -> if
	:: in_grace && limit_spent -> outcome = limited
	:: else -> if
	:: in_grace -> outcome = reused
	:: else -> if
#ifdef BROKEN_OLD_IS_UNKNOWN
	:: prev_step != token -> outcome = ahead
	:: else -> outcome = replay
#else
	:: true -> outcome = replay
#endif
	fi fi fi fi fi fi fi fi fi fi
}

/* What the SET does. answer is the token handed out. */
inline act(token) {
	answer = NO;
	if
	:: outcome == rotated ->
		answer = issued;
		of_generation[issued] = of_generation[token] + 1;
		issued++;
		generation = generation + 1;
		prev_step = step;
		step = answer;
		step_seed = GRACE;
		window = GRACE
	:: outcome == reused ->
#ifdef BROKEN_NEW_SUCCESSOR
		answer = issued;
		of_generation[issued] = generation;
		issued++;
		step = answer
#else
		answer = step
#endif
	:: outcome == replay ->
		revoked_at = true
	:: else
	fi
}

/* judge comes after act and before note. */
inline judge(token) {
	claim(1, outcome != rotated || !has(h_spent, token));
	claim(1, !(token == h_current && live && !limit_spent) || outcome == rotated);
	claim(2, !has(h_spent, token) || graceful(token) && live || revoked_at);
	claim(3, outcome != reused || graceful(token) && answer == h_current);
	claim(3, !(graceful(token) && live && !limit_spent) || outcome == reused);
	claim(4, !(h_ended || over) || !ok(outcome));
	claim(4, !h_ended || revoked_at);
	claim(5, !h_answered || !ok(outcome));
	claim(7, !newer || outcome == ahead && revoked_at == r_revoked);
	claim(7, !has(h_lost, token) || !ok(outcome));
	assert(outcome != NEVER)
}

inline note(token) {
	if
	:: outcome == rotated ->
		h_spent = h_spent | (1 << token);
		h_last = token;
		h_current = answer
	:: outcome == replay -> h_ended = true
	:: else
	fi
}

active [CLIENTS] proctype client() {
	mtype outcome = none;
	unsigned token : 4 = NO;
	unsigned answer : 4 = NO;
	bool limit_spent, newer, r_revoked;
	unsigned r_generation : 3;
	unsigned r_step : 4;
end:
	do
	:: atomic { pick(token) } /* a request is under way */
		if
		:: FAULTS -> atomic { token = NO } /* it never arrives, or the replica dies before */
		:: atomic {
			if
			:: LIMIT -> limit_spent = true
			:: limit_spent = false
			fi;
			newer = generation < of_generation[token];
			r_revoked = revoked_at;
			r_generation = generation;
			r_step = step;
			decide(token);
#ifdef BROKEN_TWO_STEPS
		} atomic {
#endif
			if
			:: ok(outcome) && issued == TOKENS -> goto enough /* the search ends here */
			:: else
			fi;
			claim(6, generation == r_generation && step == r_step && revoked_at == r_revoked);
			act(token);
			judge(token);
			note(token);
			limit_spent = false; newer = false; r_revoked = false; r_generation = 0; r_step = 0;
			token = NO; outcome = none
			}
			if
			:: atomic { answer != NO -> give(answer); answer = NO }
			:: atomic { answer == NO -> skip }
			:: FAULTS -> atomic { answer = NO } /* the answer is lost */
			fi
		fi
	od;
enough:
	skip
}

/* Logout, a password change, an operator. */
active [REVOKE] proctype revoker() {
end:
#ifdef BROKEN_ANSWER_BEFORE_COMMIT
	h_answered = true;
	atomic { revoked_at = true; h_ended = true }
#else
	atomic { revoked_at = true; h_ended = true }
	h_answered = h_ended /* unless a promotion came in between */
#endif
}

active proctype clock() {
end:
	do
	:: atomic { window -> window = false; s_window = false }
	:: atomic { !over -> over = true; s_over = true }
	:: atomic { s_window -> s_window = false } /* the standby's used_at is older */
	:: atomic { !s_over -> s_over = true }
	od
}

/* The standby follows as it likes, and is promoted once. What a lagging one
   had not received is undone, an answered revocation too: synchronous
   replication is what the runbook has against that. */
active [PROMOTE] proctype standby() {
end:
	do
	:: atomic {
		s_generation = generation; s_step = step; s_prev_step = prev_step; s_step_seed = step_seed;
		s_revoked_at = revoked_at; s_over = over; s_window = window; s_issued = issued;
		sh_spent = h_spent; sh_current = h_current; sh_last = h_last; sh_ended = h_ended
		}
	:: atomic {
		generation = s_generation; step = s_step; prev_step = s_prev_step; step_seed = s_step_seed;
		revoked_at = s_revoked_at; over = s_over; window = s_window;
		h_spent = sh_spent; h_current = sh_current; h_last = sh_last; h_ended = sh_ended;
		h_answered = h_answered && sh_ended;
		h_lost = ((1 << issued) - 1) & ~((1 << s_issued) - 1);
		break
		}
	od
}
